import pytest
import torch

from vllm_kvpress.policies import LayerObservation


@pytest.fixture
def observe():
    """Makes observations of random tensors; rounds to `dtype` first, as a cache would."""

    def make(
        num_kv_heads=2,
        group=2,
        num_tokens=50,
        head_dim=16,
        window=8,
        dtype=torch.float32,
        layer_idx=3,
        kv_heads=None,
        seed=42,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        return LayerObservation(
            keys=normal(num_kv_heads, num_tokens, head_dim) + 0.3,
            values=normal(num_kv_heads, num_tokens, head_dim),
            queries=normal(num_kv_heads * group, window, head_dim) * 3,
            positions=torch.arange(num_tokens).repeat(num_kv_heads, 1) * 2 + 1,
            layer_idx=layer_idx,
            kv_heads=tuple(range(num_kv_heads)) if kv_heads is None else kv_heads,
            scale=head_dim**-0.5,
        )

    return make
