"""The bundled policy files, one YAML a policy; installed as ``vllm_kvpress.configs``."""
