"""DuoAttention's labels: a trainable gate for each KV head of a frozen model.

    attention of head h = gate[h] * full + (1 - gate[h]) * streaming,   gate in [0, 1], from 1 on
    loss = mean over answer tokens and channels of (hidden - hidden with gates)^2
           + reg_weight * sum of gates

Hidden states are the last layer's, after the final norm. A head whose distant tokens the answers
need pays for a small gate by the first term; the second pulls all others to 0.

Source: arXiv 2410.10819, section 3.2, and `duo_attn/train.py` of
https://github.com/mit-han-lab/duo-attention, read, not copied: AdamW without weight decay, learning
rate 0.02, up over the first fifth of 2000 steps and down over the last, never below a tenth of it;
sinks 128, recent 256, reg_weight 0.05. Deviations: the documents are this project's generated ones,
one a step, in place of pass keys in a book; gates are clamped after a step, not before the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvpress.calibration.attention import (
    Heads,
    attending,
    full_attention,
    hidden_states,
    streaming_mask,
)
from vllm_kvpress.errors import ConfigError, shown

__all__ = ["DuoSettings", "Sample", "train_gates"]

_CHECKPOINT_STEPS = 25


@dataclass(frozen=True, kw_only=True)
class DuoSettings:
    """What a training run is made of; equal settings and samples give equal gates.

    Attributes:
        model: the model as the user named it.
        steps: of the optimiser, one document each.
        length: longest document, in tokens; the shortest has a quarter.
        sink_tokens: first tokens that a streaming head sees.
        recent_tokens: newest tokens that it sees, the query's own included.
        reg_weight: what a gate costs.
        learning_rate: at its highest.
        seed: draws the documents.
    """

    model: str
    steps: int = 2000
    length: int = 4096
    sink_tokens: int = 128
    recent_tokens: int = 256
    reg_weight: float = 0.05
    learning_rate: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """A document with its answer.

    Attributes:
        ids: token ids, [num_tokens].
        first_answer: index of the first hidden state that predicts a token of the answer.
    """

    ids: Tensor
    first_answer: int


def train_gates(
    model: Any,
    sample: Callable[[int], Sample],
    shape: tuple[int, int],
    settings: DuoSettings,
    checkpoint: Path,
    report: Callable[[int, float, Tensor], None] = lambda step, loss, gates: None,
) -> Tensor:
    """Returns the gates, float32 [num_layers, num_kv_heads] in [0, 1].

    Args:
        model: a causal language model of transformers; its weights are frozen and stay as they are.
        sample: the document of a step, the same at every call.
        shape: (num_layers, num_kv_heads).
        settings: see there.
        checkpoint: file in which an interrupted run is kept, and from which it goes on; removed at
            the end.
        report: called after each step with its number, distillation loss and gates.

    Raises:
        ConfigError: the checkpoint is of a run with other settings.
    """
    model.requires_grad_(False)
    gates = torch.nn.Parameter(torch.ones(shape, device=model.device))
    optimizer = torch.optim.AdamW([gates], lr=settings.learning_rate, weight_decay=0)
    start = _resume(checkpoint, settings, gates, optimizer)
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate_share(step, settings.steps)
        optimizer.zero_grad()
        loss = _distillation_loss(model, sample(step), gates, settings)
        torch.autograd.backward(loss + settings.reg_weight * gates.sum())
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        report(step + 1, loss.item(), gates.detach())
        if (step + 1) % _CHECKPOINT_STEPS == 0:
            _save(checkpoint, settings, gates, optimizer, step + 1)
    checkpoint.unlink(missing_ok=True)
    return gates.detach().cpu()


def _rate_share(step: int, steps: int) -> float:
    fifth = max(1, steps // 5)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _distillation_loss(model: Any, sample: Sample, gates: Tensor, settings: DuoSettings) -> Tensor:
    ids = sample.ids.to(model.device)
    streaming = streaming_mask(len(ids), settings.sink_tokens, settings.recent_tokens, ids.device)

    def gated(heads: Heads) -> Tensor:
        full = full_attention(heads)
        if heads.window is not None:  # keeps its own cache whatever the gate says
            return full
        gate = gates[heads.layer].repeat_interleave(full.shape[1] // gates.shape[1])
        gate = gate[:, None, None].to(full.dtype)
        return gate * full + (1 - gate) * heads.attend(streaming)

    with torch.no_grad(), attending(model, full_attention):
        expected = hidden_states(model, ids)[0, sample.first_answer : -1].float()
    with attending(model, gated):
        states = hidden_states(model, ids)[0, sample.first_answer : -1].float()
    return (states - expected).square().mean()


def _resume(
    checkpoint: Path, settings: DuoSettings, gates: Tensor, optimizer: torch.optim.Optimizer
) -> int:
    """Restores an interrupted run; returns the steps that are done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location=gates.device, weights_only=True)
    if state["settings"] != json.dumps(asdict(settings)):
        raise ConfigError(
            f"the checkpoint {shown(str(checkpoint))} is of a run with other settings",
            got=state["settings"],
            fix="Give the same options, another --out, or remove it",
        )
    with torch.no_grad():
        gates.copy_(state["gates"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(
    checkpoint: Path,
    settings: DuoSettings,
    gates: Tensor,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = {
        "settings": json.dumps(asdict(settings)),
        "gates": gates.detach(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    # Replaced in one move: an interruption here leaves the older checkpoint whole.
    draft = checkpoint.with_suffix(checkpoint.suffix + ".new")
    torch.save(state, draft)
    draft.replace(checkpoint)
