"""Defaults for tests that start engines, set before vLLM is imported: here, small, quiet."""

import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Tiny matrices: more threads only wait for each other, and bound ones all wait for the same core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Triton decides as it is imported whether kernels are interpreted, and vLLM imports it. On a
# machine with a GPU, TRITON_INTERPRET=0 runs the kernels' tests compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

# `from reference...` and `from engine...`, whatever the import mode.
TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

# How long an example takes says how busy the machine is; a test that hangs has pytest's own limit.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
