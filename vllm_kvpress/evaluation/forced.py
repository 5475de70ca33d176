"""Outputs that are given: how a question reaches a cache that was compressed before it was asked.

A logits processor of vLLM's, one of two modules here that import vLLM. A request names the tokens
that it must generate first in `SamplingParams.extra_args`; from then on the model is free. Each of
them is computed in a decode step, so it reads the compressed cache and joins it, as any output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

__all__ = ["EXTRA_ARG", "ForcedOutputs"]

EXTRA_ARG = "kvpress_forced_tokens"


class _Forced:
    """Leaves one token possible as long as there are given ones."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __call__(self, output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output_ids) >= len(self._tokens):
            return logits
        only = torch.full_like(logits, float("-inf"))
        only[self._tokens[len(output_ids)]] = 0.0
        return only


class ForcedOutputs(AdapterLogitsProcessor):
    """Reads the given tokens of a request; leaves requests without any alone."""

    def is_argmax_invariant(self) -> bool:
        """Return False: it decides what is sampled."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> _Forced | None:
        """Return what forces a new request's outputs, or None."""
        tokens = (params.extra_args or {}).get(EXTRA_ARG)
        return _Forced(tokens) if tokens else None
