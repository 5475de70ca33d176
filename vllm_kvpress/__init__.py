"""KV-cache compression policies for stock vLLM; see README.md.

Importing this package does nothing: vLLM calls `register` and `arm` through entry points.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "arm", "register"]


def register() -> None:
    """Makes `--kv-policy` known to vLLM; vLLM calls it in every one of its processes.

    Imports happen here, not at the top: vLLM only logs an exception while it *loads* an entry
    point, and a policy that was asked for would then be ignored without a word.
    """
    from vllm_kvpress.integration import plugin

    plugin.register()


def arm() -> None:
    """Makes `LLM(kv_policy=...)` known before vLLM loads general plugins; names no platform."""
    from vllm_kvpress.integration import plugin

    plugin.arm()
