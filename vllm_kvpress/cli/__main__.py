"""`python -m vllm_kvpress.cli` is the command `vllm-kvpress`."""

import sys

from vllm_kvpress.cli import main

sys.exit(main())
