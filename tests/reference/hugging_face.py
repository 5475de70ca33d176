"""What an engine under a policy must answer: a plain Hugging Face model whose cache is pruned.

Nothing of the model is ours. The prompt runs through transformers' own forward pass; then the cache
of each layer and KV head loses what the rule does not keep, and every further token is computed
from what is left, at its true position. Events while decoding are `dense.py`'s business.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reference.dense import Kept, Rule, choose
from reference.scorers import SCORERS, Observation

__all__ = ["Answer", "HuggingFaceReference", "load"]


class Answer(NamedTuple):
    """What a request must produce.

    Attributes:
        outputs: Greedy outputs, the stop token included.
        logprobs: float32 [num_outputs, vocab].
        kept: What the event at the prompt's end kept.
        flips: As in `reference.dense.Result`; none means that the kept sets are equal.
    """

    outputs: list[int]
    logprobs: Tensor
    kept: Kept
    flips: list[float]


def load(path: Path | str) -> Any:
    """Returns the Hugging Face model in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class HuggingFaceReference:
    """Runs a Hugging Face Llama under a rule, one request at a time.

    Args:
        model: What `load` returns.
        rule: The policy, without events while decoding.
    """

    def __init__(self, model: Any, rule: Rule) -> None:
        assert rule.prompt_end, "the event at the prompt's end is the only one"
        assert not rule.every, "the event at the prompt's end is the only one"
        self.model = model
        self.rule = rule

    @torch.inference_mode()
    def answer(
        self,
        prompt: Sequence[int],
        num_outputs: int,
        *,
        stop: int,
        given: Sequence[int] = (),
        forced_kept: Kept | None = None,
    ) -> Answer:
        """Returns what the model answers.

        Args:
            prompt: Token ids.
            num_outputs: Most outputs.
            stop: The token that ends an answer.
            given: The first outputs, which are not the model's to choose.
            forced_kept: What the event keeps instead of the rule's own choice.
        """
        cache = DynamicCache()
        logits, queries = self._prefill(prompt, cache)
        held = torch.arange(len(prompt))  # the positions in the cache, until heads differ
        kept: Kept = {}
        flips: list[float] = []
        outputs: list[int] = []
        rows: list[Tensor] = []
        for position in range(len(prompt), len(prompt) + num_outputs):
            rows.append(logits.log_softmax(-1))
            forced = given[len(outputs) : len(outputs) + 1]
            outputs += forced or [int(logits.argmax())]
            if outputs[-1] == stop:
                break
            if self.rule.events(len(prompt), position - 1, position):
                kept, flips = self._evict(cache, queries, len(prompt), forced_kept)
            held = self._slide(cache, held, len(prompt), position)
            logits = self._step(outputs[-1], position, cache)
        return Answer(outputs, torch.stack(rows), kept, flips)

    def _prefill(self, prompt: Sequence[int], cache: DynamicCache) -> tuple[Tensor, list[Tensor]]:
        """Returns the last token's logits and each layer's queries [num_heads, num_tokens, dim]."""
        tokens, positions = torch.tensor([list(prompt)]), torch.arange(len(prompt))[None]
        done = self.model(
            tokens, position_ids=positions, past_key_values=cache, output_hidden_states=True
        )
        rope = self.model.model.rotary_emb(done.hidden_states[0], positions)
        queries = []
        for layer, hidden in zip(self.model.model.layers, done.hidden_states[:-1], strict=True):
            attention = layer.self_attn
            flat = attention.q_proj(layer.input_layernorm(hidden))
            plain = flat.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            queries.append(apply_rotary_pos_emb(plain, plain, *rope)[0][0])
        return done.logits[0, -1].float(), queries

    def _step(self, token: int, position: int, cache: DynamicCache) -> Tensor:
        """Returns the logits after one more token, at its position in the whole text."""
        done = self.model(
            torch.tensor([[token]]),
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
        )
        return done.logits[0, -1].float()

    def _evict(
        self, cache: DynamicCache, queries: list[Tensor], event: int, forced_kept: Kept | None
    ) -> tuple[Kept, list[float]]:
        """Prunes each layer and KV head by its own scores; returns what is kept, and the flips."""
        positions = torch.arange(event)
        tail = list(range(event - event % self.rule.block_size, event))
        all_kept: Kept = {}
        all_flips: list[float] = []
        for index, layer in enumerate(cache.layers):
            heads = layer.keys.shape[1]
            survivors = []
            for head, prompt_queries in enumerate(queries[index].chunk(heads)):
                seen = Observation(
                    layer=index,
                    head=head,
                    positions=positions,
                    keys=layer.keys[0, head],
                    values=layer.values[0, head],
                    prompt_queries=prompt_queries.transpose(0, 1),
                )
                scores = SCORERS[self.rule.scorer](seen, **self.rule.params)
                forced = (forced_kept or {}).get((event, index, head))
                kept, flips = choose(self.rule, event, event, positions, scores, forced)
                all_kept[event, index, head] = kept
                all_flips += flips
                survivors.append([*kept, *tail])
            _keep(layer, torch.tensor(survivors))
        return all_kept, all_flips

    def _slide(self, cache: DynamicCache, held: Tensor, prompt_len: int, position: int) -> Tensor:
        """Prunes what has left the window before a token is computed; returns what is held then."""
        if self.rule.scorer != "window":
            return held
        seen = self.rule.window(prompt_len, position, position)[held]
        for layer in cache.layers:
            _keep(layer, seen.nonzero().flatten().expand(layer.keys.shape[1], -1))
        return torch.cat((held[seen], torch.tensor([position])))


def _keep(layer: Any, indices: Tensor) -> None:
    """Leaves each KV head its own slots [num_kv_heads, num_kept] of one layer's cache."""
    wide = indices[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
    layer.keys, layer.values = layer.keys.gather(2, wide), layer.values.gather(2, wide)
