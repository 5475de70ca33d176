"""The package list; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# `configs/` sits at the top of the repository, where policies are read and edited, and installs as
# `vllm_kvpress.configs`. A `packages.find` table cannot add a mapped package, so it is added here.
setup(packages=[*find_packages(include=["vllm_kvpress", "vllm_kvpress.*"]), "vllm_kvpress.configs"])
