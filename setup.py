"""The package list; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# `configs/` and `kernels/` sit at the top of the repository, where policies are read and kernels
# tuned, and install as `vllm_kvpress.configs` and `vllm_kvpress.kernels`. A `packages.find` table
# cannot add mapped packages, so they are added here.
OWN = find_packages(include=["vllm_kvpress", "vllm_kvpress.*"])
KERNELS = [f"vllm_kvpress.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
setup(packages=[*OWN, *KERNELS, "vllm_kvpress.configs"])
