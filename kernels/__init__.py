"""Kernels: one folder an operation, each with a PyTorch reference beside its Triton kernel.

Installed as `vllm_kvpress.kernels`. An operation takes its layout as plain numbers (`Cells`), never
computes a page size itself, and runs its reference on CPU tensors, its kernel on CUDA tensors.
"""
