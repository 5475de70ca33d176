"""What an engine under a policy must compute: a dense Llama that keeps every K and V and masks.

Independent on purpose: it imports neither vllm nor vllm_kvpress. Each (layer, KV head) has a set
of visible positions; eviction takes positions out of it, attention masks the rest.

    chunk [x, y)  attends under the visibility left by the events E <= x
    then          the last event with x < E <= y takes place (earlier ones collapse into it)
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from safetensors.torch import load_file
from torch import Tensor

from reference.scorers import SCORERS, Observation

__all__ = ["DenseLlama", "DenseReference", "Kept", "Result", "Rule", "Run", "choose", "pick"]

# (event, layer, KV head) -> the sorted positions below the event's open block that survive it.
Kept = dict[tuple[int, int, int], list[int]]


@dataclass(frozen=True)
class Rule:
    """A policy in the reference's own words; sizes in tokens.

    Attributes:
        budget: tokens kept per (layer, KV head), or None: `keep_ratio` of the prompt, or, in
            window mode, sinks + recent.
        every: distance of decode events; 0 for none.
        scorer: a name in `SCORERS`; "full" never evicts, "window" is StreamingLLM.
        params: the scorer's parameters.
        skip: layers that see and keep everything.
    """

    block_size: int
    scorer: str = "full"
    sinks: int = 4
    recent: int = 64
    budget: int | None = None
    keep_ratio: float | None = None
    prompt_end: bool = True
    every: int = 0
    params: dict = field(default_factory=dict)
    skip: tuple[int, ...] = ()

    def budget_of(self, prompt_len: int) -> int:
        """Returns the tokens kept for a prompt of this length."""
        if self.budget is not None:
            return self.budget
        if self.keep_ratio is None:
            return self.sinks + self.recent
        # The open block is up to one token short of full; sinks fill whole blocks beside it.
        sinks_blocks = -(-self.sinks // self.block_size) * self.block_size
        least = max(self.sinks + self.recent, sinks_blocks) + self.block_size - 1
        return max(int(self.keep_ratio * prompt_len), least)

    def events(self, prompt_len: int, start: int, end: int) -> list[int]:
        """Returns the effective events E with start < E <= end."""
        if self.scorer in ("full", "window"):
            return []
        every = range(prompt_len + self.every, end + 1, self.every) if self.every else ()
        all_events = [prompt_len] * self.prompt_end + list(every)
        return [e for e in all_events if start < e <= end and e > self.budget_of(prompt_len)]

    def run(self, model: "DenseLlama", prompt_len: int, *args: Any) -> "Run":
        """Returns the empty cache of a request."""
        return Run(model, self, prompt_len, *args)

    def window(self, prompt_len: int, start: int, num_keys: int) -> Tensor:
        """Returns which of the positions [0, num_keys) a chunk that begins at `start` may see."""
        positions = torch.arange(num_keys)
        if self.scorer != "window" or start < prompt_len:
            return positions >= 0
        window = self.budget_of(prompt_len) - self.sinks
        sinks_end = -(-self.sinks // self.block_size) * self.block_size
        window_start = max(0, start - window) // self.block_size * self.block_size
        return (positions < sinks_end) | (positions >= window_start)


def choose(
    rule: Rule,
    prompt_len: int,
    event: int,
    positions: Tensor,
    scores: Tensor,
    forced_choice: Sequence[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Returns what an event keeps below its open block, and the flips against a forced choice.

    Args:
        rule: The policy.
        prompt_len: Tokens of the prompt.
        event: Where the event takes place.
        positions: What the KV head still holds, ascending.
        scores: Its scores, float32 [num_tokens].
        forced_choice: What is kept instead of the rule's own choice; flips as in `Result`.
    """
    tail = event % rule.block_size
    num_kept = max(0, rule.budget_of(prompt_len) - tail) // rule.block_size * rule.block_size
    forced = (positions < rule.sinks) | (positions >= event - rule.recent)
    candidates = positions < event - tail
    return pick(positions, scores, forced, candidates, num_kept, forced_choice)


def pick(
    positions: Tensor,
    scores: Tensor,
    forced: Tensor,
    candidates: Tensor,
    num_kept: int,
    forced_choice: Sequence[int] | None = None,
) -> tuple[list[int], list[float]]:
    """Returns the kept positions, and the flips against a forced choice.

    Args:
        positions: What is held, ascending.
        scores: Its scores, float32 [num_tokens].
        forced: What is kept whatever its score, bool [num_tokens].
        candidates: What may be kept at all, bool [num_tokens].
        num_kept: How many are.
        forced_choice: What is kept instead of the own choice; flips as in `Result`.
    """
    assert not scores.isnan().any(), "a score is NaN"
    assert int((forced & candidates).sum()) <= num_kept <= int(candidates.sum())
    # Stable sorts, the least significant first: ties go to the lower position.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(forced[order].int(), descending=True, stable=True)]
    order = order[candidates[order]]
    own = sorted(positions[order[:num_kept]].tolist())
    if forced_choice is None:
        return own, []
    flips = []
    if num_kept:
        score_of = dict(zip(positions.tolist(), scores.tolist(), strict=True))
        cut = float(scores[order[num_kept - 1]])
        spread = float(scores[scores.isfinite()].std()) + 1e-30
        flipped = set(own) ^ set(forced_choice)
        flips = [abs(score_of[position] - cut) / spread for position in flipped]
    return sorted(forced_choice), flips


class Result(NamedTuple):
    """What a request must produce.

    Attributes:
        logprobs: float32 [num_outputs, vocab].
        kept: What each event kept.
        flips: For each position that a forced choice and the rule's own do not share, how far its
            score lies from the cut, relative to the spread (standard deviation) of all scores.
    """

    logprobs: Tensor
    kept: Kept
    flips: list[float]


class DenseLlama:
    """The weights of a Hugging Face Llama checkpoint and the parts of its forward pass.

    Args:
        path: Folder of the checkpoint.
        dtype: Of weights and activations.
        cache_dtype: What every K (after RoPE) and V is rounded to before anyone reads it.
    """

    def __init__(
        self,
        path: Path | str,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.cache_dtype = cache_dtype
        config = json.loads((Path(path) / "config.json").read_text())
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.eps = config["rms_norm_eps"]
        rope = config.get("rope_parameters") or {}
        assert rope.get("rope_type", "default") == "default", "only plain RoPE"
        theta = rope.get("rope_theta") or config["rope_theta"]
        # In float32, products with positions too: that rounding is part of how the model is defined
        # (Hugging Face and vLLM agree on it), and it is large at far positions.
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        self._frequencies = 1.0 / theta**exponents
        self._weights: dict[str, Tensor] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            self._weights |= {name: w.to(dtype) for name, w in load_file(file).items()}
        self.dtype = dtype
        self._tied = config.get("tie_word_embeddings", False)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Returns hidden states [num_tokens, hidden]."""
        return self._weights["model.embed_tokens.weight"][torch.tensor(list(tokens))]

    def qkv(self, layer: int, hidden: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k, v [num_tokens, heads, head_dim], RoPE applied from position `start` on."""
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            self._linear(x, f"model.layers.{layer}.self_attn.{name}_proj.weight").unflatten(
                -1, (-1, self.head_dim)
            )
            for name in "qkv"
        )
        return self._rotate(q, start), self._cached(self._rotate(k, start)), self._cached(v)

    def _cached(self, x: Tensor) -> Tensor:
        if self.cache_dtype is None:
            return x
        near = x.to(self.cache_dtype)
        # vLLM's CPU op rounds towards zero: one step back where rounding to nearest went outwards.
        outwards = near.to(x.dtype).abs() > x.abs()
        stored = near.view(torch.uint8) - outwards.to(torch.uint8)
        return stored.view(self.cache_dtype).to(x.dtype)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Returns the layer's output from its input and attention [num_tokens, heads, head_dim]."""
        prefix = f"model.layers.{layer}."
        hidden = hidden + self._linear(attended.flatten(1), f"{prefix}self_attn.o_proj.weight")
        x = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
        gate = F.silu(self._linear(x, f"{prefix}mlp.gate_proj.weight"))
        up = self._linear(x, f"{prefix}mlp.up_proj.weight")
        return hidden + self._linear(gate * up, f"{prefix}mlp.down_proj.weight")

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Returns float32 log-probabilities [num_tokens, vocab] of the last layer's output."""
        head = "model.embed_tokens.weight" if self._tied else "lm_head.weight"
        logits = self._linear(self._norm(hidden, "model.norm.weight"), head)
        return logits.float().log_softmax(-1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self._weights[name].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self._weights[name] * scaled.to(x.dtype)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + x.shape[0]).float()
        angles = torch.outer(positions, self._frequencies)[:, None, :]  # [num_tokens, 1, dim / 2]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class DenseReference:
    """Runs a model under a rule, for one request at a time."""

    def __init__(self, model: DenseLlama, rule: Rule) -> None:
        self.model = model
        self.rule = rule

    @torch.inference_mode()
    def logprobs(
        self,
        prompt: Sequence[int],
        outputs: Sequence[int],
        chunks: Iterable[tuple[int, int]] | None = None,
        forced_kept: Sequence[Kept] | None = None,
        delivered: Sequence[int] = (),
    ) -> Result:
        """Returns the log-probabilities that the given outputs were chosen from.

        Args:
            prompt: token ids.
            outputs: token ids, fed back one after the other (teacher forcing).
            chunks: how the engine cut [0, P + num_outputs - 1): half-open, in order. A preempted
                request starts over: (0, y) again replays everything before y in one chunk. By
                default the prompt is one chunk and each output a chunk of its own.
            forced_kept: what events keep instead of the rule's own choice, one entry for each time
                the request started; the rule itself decides events that are not in it.
            delivered: how many outputs the request had each time it started over; an asynchronous
                engine drops what was in flight, and computes it again.
        """
        tokens = [*prompt, *outputs]
        total = len(tokens) - 1
        rows = torch.empty(len(outputs), 0)
        starts_over = iter(forced_kept) if forced_kept is not None else None
        deliveries = iter(delivered)
        kept: Kept = {}
        flips: list[float] = []
        run: Run | None = None
        for start, end in chunks or default_chunks(len(prompt), total):
            if start == 0:
                forced = next(starts_over) if starts_over is not None else None
                if run is not None:
                    rows[next(deliveries, len(rows)) :] = torch.nan
                run = self.rule.run(self.model, len(prompt), forced, kept, flips)
            assert run is not None, "the first chunk starts at 0"
            logprobs = run.step(tokens[start:end], start)
            if rows.shape[1] == 0:
                rows = torch.full((len(outputs), logprobs.shape[1]), torch.nan)
            first = max(start, len(prompt) - 1)
            if first < end:
                # A replay computes again what the engine has long delivered: the first counts.
                slots = rows[first - len(prompt) + 1 : end - len(prompt) + 1]
                slots.copy_(torch.where(slots.isnan(), logprobs[first - start :], slots))
        assert not rows.isnan().any(), "the chunks leave outputs out"
        return Result(rows, kept, flips)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], num_outputs: int) -> list[int]:
        """Returns the outputs of greedy decoding, end-of-sequence tokens ignored."""
        run = self.rule.run(self.model, len(prompt), None, {}, [])
        outputs = [int(run.step(prompt, 0)[-1].argmax())]
        while len(outputs) < num_outputs:
            position = len(prompt) + len(outputs) - 1
            outputs.append(int(run.step(outputs[-1:], position)[-1].argmax()))
        return outputs


def default_chunks(prompt_len: int, total: int) -> list[tuple[int, int]]:
    """Returns the prompt as one chunk, then a chunk for each further token of `total`."""
    return [(0, prompt_len), *((start, start + 1) for start in range(prompt_len, total))]


class Run:
    """The cache of one request, from its first token on."""

    def __init__(
        self,
        model: DenseLlama,
        rule: Rule,
        prompt_len: int,
        forced_kept: Kept | None,
        kept: Kept,
        flips: list[float],
    ) -> None:
        self.model = model
        self.rule = rule
        self.layers = [layer for layer in range(model.num_layers) if layer not in rule.skip]
        self.prompt_len = prompt_len
        self.forced_kept = forced_kept
        self.kept = kept
        self.flips = flips
        # Per layer: [num_tokens, heads, head_dim]. Queries are kept too: scorers look back at them.
        empty = [torch.empty(0, 0, 0)] * model.num_layers
        self.queries, self.keys, self.values = list(empty), list(empty), list(empty)
        # [num_layers, num_kv_heads, num_tokens]
        self.visible = torch.ones(model.num_layers, model.num_kv_heads, 0, dtype=torch.bool)

    def step(self, tokens: Sequence[int], start: int) -> Tensor:
        """Computes positions [start, start + len(tokens)) and the event that falls due."""
        assert start == self.visible.shape[2], "a chunk starts where the last one ended"
        end = start + len(tokens)
        self.visible = F.pad(self.visible, (0, len(tokens)), value=True)
        hidden = self.model.embed(tokens)
        for layer in range(self.model.num_layers):
            q, k, v = self.model.qkv(layer, hidden, start)
            k, v = self.written(layer, k, v, start)
            if start:
                k = torch.cat((self.keys[layer], k))
                v = torch.cat((self.values[layer], v))
                self.queries[layer] = torch.cat((self.queries[layer], q))
            else:
                self.queries[layer] = q
            self.keys[layer], self.values[layer] = k, v
            hidden = self.model.finish(layer, hidden, self._attend(layer, q, start))
        logprobs = self.model.logprobs(hidden)
        events = self.rule.events(self.prompt_len, start, end)
        if events:
            self._evict(events[-1])
        return logprobs

    def written(self, layer: int, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Returns what the cache holds of a chunk's keys and values, and everyone reads."""
        return k, v

    def _attend(self, layer: int, q: Tensor, start: int) -> Tensor:
        group = q.shape[1] // self.model.num_kv_heads
        keys = self.keys[layer].repeat_interleave(group, dim=1)
        values = self.values[layer].repeat_interleave(group, dim=1)
        num_keys = keys.shape[0]
        causal = torch.ones(len(q), num_keys, dtype=torch.bool).tril(num_keys - len(q))
        seen = self.visible[layer].repeat_interleave(group, dim=0)[:, None, :] & causal
        if layer not in self.rule.skip:
            seen &= self.rule.window(self.prompt_len, start, num_keys)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * self.model.head_dim**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    def _evict(self, event: int) -> None:
        closed = event - event % self.rule.block_size
        for layer in self.layers:
            for head in self.evicting_heads(layer):
                key = (event, layer, head)
                # An engine leaves out the event of a request's very last step: nothing reads it.
                forced = (self.forced_kept or {}).get(key)
                positions = self.visible[layer, head, :event].nonzero().flatten()
                seen = self._observe(layer, head, positions)
                scores = SCORERS[self.rule.scorer](seen, **self.rule.params)
                self.kept[key], flips = choose(
                    self.rule, self.prompt_len, event, positions, scores, forced
                )
                self.flips += flips
                self.visible[layer, head, :closed] = False
                self.visible[layer, head, self.kept[key]] = True

    def evicting_heads(self, layer: int) -> Sequence[int]:
        """Returns the KV heads of a layer in which events take place."""
        return range(self.model.num_kv_heads)

    def _observe(self, layer: int, head: int, positions: Tensor) -> Observation:
        group = self.model.num_heads // self.model.num_kv_heads
        queries = self.queries[layer][: self.prompt_len, head * group : (head + 1) * group]
        return Observation(
            layer=layer,
            head=head,
            positions=positions,
            keys=self.keys[layer][positions, head],
            values=self.values[layer][positions, head],
            prompt_queries=queries,
        )
