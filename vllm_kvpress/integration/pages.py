"""Pages: how K and V of a token lie in a block of the inner backend's cache.

Every vLLM backend stores a layer's block as one dense page of num_kv_heads * block_size *
2 * head_dim elements, but orders them as its kernels like: CPU_ATTN transposes or interleaves
per instruction set, CUDA backends use head-major or token-major pages. The order is always a
permutation, and the same for every block. We learn it once at start by writing a pattern through
the backend's own cache-write op; reading and writing tokens is then a gather.

With `--kv-cache-dtype fp8` the elements are bytes: events move them as they are, so a survivor is
quantized once, when it is written; scorers see the numbers that the bytes stand for.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvpress.errors import UnsupportedVLLMError

# Integers below it are exact in bf16, fp16 and fp32; in fp8 (e4m3 and e5m2).
_DIGIT, _FP8_DIGIT = 128, 8


def element_dtype(layer: Any) -> torch.dtype:
    """Returns the dtype of a layer's cache elements: vLLM keeps fp8 in a tensor of bytes.

    Args:
        layer: A vLLM `Attention` layer with a bound `kv_cache`.
    """
    if layer.kv_cache.dtype != torch.uint8:
        return layer.kv_cache.dtype  # type: ignore[no-any-return]
    if layer.kv_cache_dtype == "fp8_e5m2":
        return torch.float8_e5m2
    from vllm.platforms import current_platform

    return current_platform.fp8_dtype()


def numbers(elements: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Returns what cache elements stand for: themselves, or fp8 times its scale, as float32.

    Args:
        elements: Of the cache's dtype, any shape.
        dtype: Their `element_dtype`.
        scale: Of fp8; not used otherwise.
    """
    if elements.dtype == dtype:
        return elements
    return elements.view(dtype).float() * scale


def flat_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """Returns a layer's cache as pages, aliasing it.

    Args:
        kv_cache: [num_blocks, heads, block_size, content], dense inside a block.

    Returns:
        [num_blocks, page_elements].

    Raises:
        UnsupportedVLLMError: if a block is not one dense page.
    """
    num_blocks, *inner = kv_cache.shape
    expected = 1
    for stride, size in sorted(zip(kv_cache.stride()[1:], inner, strict=True)):
        if size > 1 and stride != expected:
            raise UnsupportedVLLMError(
                "a KV-cache block is not one dense page",
                got=f"shape {tuple(kv_cache.shape)}, strides {kv_cache.stride()}",
                allowed="layouts whose heads, tokens and content lie densely inside a block",
                fix="Unset VLLM_KV_CACHE_LAYOUT or choose another --attention-backend",
            )
        expected *= size
    return kv_cache.as_strided((num_blocks, expected), (kv_cache.stride(0), 1))


class PageMap:
    """The place of every K and V element in a page.

    Attributes:
        num_kv_heads: KV heads of the layer on this rank.
        block_size: Tokens in a block.
        head_dim: Elements of one K or V vector.
        order: int64 [2 * num_kv_heads * block_size * head_dim]; page index of each element of
            the canonical order [K|V, num_kv_heads, block_size, head_dim].
        inverse: The inverse permutation.
    """

    def __init__(
        self, num_kv_heads: int, block_size: int, head_dim: int, order: torch.Tensor
    ) -> None:
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.head_dim = head_dim
        self.order = order
        self.inverse = torch.argsort(order)

    @classmethod
    def learn(cls, layer: Any, dtype: torch.dtype) -> PageMap:
        """Writes a pattern through `layer`'s own cache-write op and reads where it went.

        Args:
            layer: A vLLM `Attention` layer with a bound `kv_cache`.
            dtype: The model's, in which the op is given K and V.

        Raises:
            UnsupportedVLLMError: if the op does not store each element exactly once.
        """
        cache = layer.kv_cache
        _, heads, block_size, content = cache.shape
        head_dim = content // 2
        page_elements = heads * block_size * content
        strides = (page_elements, *cache.stride()[1:])
        scratch = torch.empty_strided(
            (2, heads, block_size, content), strides, dtype=cache.dtype, device=cache.device
        )
        slots = torch.arange(block_size, 2 * block_size, dtype=torch.int64, device=cache.device)
        # Element ids in the op's own order of arguments, [K|V, block_size, heads, head_dim], from
        # 1 on: what the op leaves out stays 0.
        ids = torch.arange(1, page_elements + 1, device=cache.device)
        found = torch.zeros(page_elements, dtype=torch.int64, device=cache.device)
        stored = element_dtype(layer)
        quantizes = stored != cache.dtype
        base = _FP8_DIGIT if quantizes else _DIGIT
        # A bit above the digit: whether the op rounds to nearest or down, the digit is stored.
        factor = 1 + 1 / 64
        scales = [layer._k_scale_float * factor, layer._v_scale_float * factor]
        weight = 1
        while weight <= page_elements:
            digit = (ids // weight % base).view(2, block_size, heads, head_dim)
            if quantizes:
                digit = torch.stack([d * scale for d, scale in zip(digit, scales, strict=True)])
            key, value = digit.to(dtype)
            scratch.zero_()
            layer.impl.do_kv_cache_update(
                layer, key.contiguous(), value.contiguous(), scratch, slots
            )
            found += flat_pages(scratch)[1].view(stored).to(torch.int64) * weight
            weight *= base
        if not torch.equal(found.sort().values, ids):
            raise UnsupportedVLLMError(
                "the attention backend does not store K and V as they are",
                got=type(layer.impl).__mro__[1].__name__,
                allowed="CPU_ATTN, FLASH_ATTN, TRITON_ATTN, FLASHINFER; a cache of auto or fp8",
                fix="Choose another --attention-backend",
            )
        place = torch.argsort(found).view(2, block_size, heads, head_dim)
        order = place.transpose(1, 2).reshape(-1)  # [K|V, heads, block_size, head_dim]
        return cls(heads, block_size, head_dim, order)

    def views(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns K and V as kernels address them, or None if no strides describe their order.

        Args:
            pages: [num_blocks, page_elements] of one layer.

        Returns:
            Two tensors [num_blocks, block_size, num_kv_heads, head_dim] that alias `pages`, dense
            along the last axis.
        """
        place = self.order.view(2, self.num_kv_heads, self.block_size, self.head_dim)
        steps = []
        for axis in (1, 2, 3):
            one = place.select(axis, min(1, place.shape[axis] - 1))
            steps.append(int((one - place.select(axis, 0)).flatten()[0]))
        head, token, channel = steps
        strided = place[:, :1, :1, :1]
        for axis, step in zip((1, 2, 3), steps, strict=True):
            shape = [1] * 4
            shape[axis] = -1
            index = torch.arange(place.shape[axis], device=place.device)
            strided = strided + (index * step).view(shape)
        if channel != 1 or not torch.equal(strided, place):
            return None
        size = (len(pages), self.block_size, self.num_kv_heads, self.head_dim)
        strides = (pages.stride(0), token, head, 1)
        keys, values = (
            pages.as_strided(size, strides, pages.storage_offset() + int(first))
            for first in place[:, 0, 0, 0]
        )
        return keys, values

    def read(self, pages: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of K and V of whole blocks, each [num_kv_heads, tokens, head_dim].

        Args:
            pages: [num_blocks, page_elements] of one layer.
            blocks: Block ids, int [n]; tokens come in their order.
        """
        shape = (len(blocks), 2, self.num_kv_heads, self.block_size, self.head_dim)
        content = pages[blocks][:, self.order].view(shape)
        keys, values = content.permute(1, 2, 0, 3, 4).flatten(2, 3)
        return keys, values

    def write(
        self, pages: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores K and V, each [num_kv_heads, n * block_size, head_dim], into whole blocks."""
        split = (self.num_kv_heads, len(blocks), self.block_size, self.head_dim)
        content = torch.stack([keys.view(split), values.view(split)])
        flat = content.permute(2, 0, 1, 3, 4).reshape(len(blocks), -1)
        pages[blocks] = flat[:, self.inverse]
