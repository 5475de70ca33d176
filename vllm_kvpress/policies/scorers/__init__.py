"""One file per method; `vllm_kvpress.policies.registry` imports them by name."""
