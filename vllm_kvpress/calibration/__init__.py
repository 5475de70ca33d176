"""Finds out which KV heads of a model retrieve: what `vllm-kvpress calibrate-heads` runs.

Needs torch and transformers, never vLLM.
"""
