"""The only package that imports vLLM: everything here turns a policy into an engine's behaviour."""
