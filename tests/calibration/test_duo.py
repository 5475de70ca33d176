"""Trained gates: high where distant tokens matter, low elsewhere, and resumable."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from vllm_kvpress.calibration.attention import Heads, attending, full_attention, streaming_mask
from vllm_kvpress.calibration.documents import draw_sample
from vllm_kvpress.calibration.duo import DuoSettings, Sample, train_gates
from vllm_kvpress.errors import ConfigError, UnsupportedModelError

SETTINGS = DuoSettings(
    model="tiny", steps=60, length=96, sink_tokens=2, recent_tokens=8, learning_rate=0.05
)
SHAPE = (2, 2)


def sample(step):
    generator = torch.Generator().manual_seed(step)
    return Sample(torch.randint(3, 64, (48,), generator=generator), 40)


@torch.no_grad()
def keep_one_head(model, layer, kv_head):
    """Cuts off every KV head but one, whose output is made to count."""
    for idx, block in enumerate(model.model.layers):
        columns = block.self_attn.o_proj.weight.view(64, 2, 64)
        for head in range(2):
            columns[:, head] *= 300.0 if (idx, head) == (layer, kv_head) else 0.0


@pytest.mark.parametrize(("layer", "kv_head"), [(0, 1), (1, 0)])
def test_the_gate_of_the_head_that_matters_stays_and_all_others_fall(
    tiny_llama, tmp_path, layer, kv_head
):
    keep_one_head(tiny_llama, layer, kv_head)

    gates = train_gates(tiny_llama, sample, SHAPE, SETTINGS, tmp_path / "checkpoint")

    assert gates[layer, kv_head] > 0.5
    others = gates.flatten().tolist()
    del others[2 * layer + kv_head]
    assert others == [0, 0, 0]


def test_without_distant_tokens_every_gate_falls(tiny_llama, tmp_path):
    """The window holds the whole document: nothing is lost by streaming."""
    keep_one_head(tiny_llama, 1, 0)
    whole = replace(SETTINGS, recent_tokens=64)

    gates = train_gates(tiny_llama, sample, SHAPE, whole, tmp_path / "checkpoint")

    assert gates.tolist() == [[0, 0], [0, 0]]


class InterruptionError(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_gates(tiny_llama, tmp_path):
    keep_one_head(tiny_llama, 1, 0)
    checkpoint = tmp_path / "checkpoint"
    straight = train_gates(tiny_llama, sample, SHAPE, SETTINGS, checkpoint)
    steps = []

    def interrupt(step, loss, gates):
        if step == 40:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train_gates(tiny_llama, sample, SHAPE, SETTINGS, checkpoint, interrupt)
    assert checkpoint.exists()
    resumed = train_gates(
        tiny_llama, sample, SHAPE, SETTINGS, checkpoint, lambda step, *_: steps.append(step)
    )

    assert steps[0] == 26
    assert resumed.equal(straight)
    assert not checkpoint.exists()


def test_a_checkpoint_of_other_settings_is_refused(tiny_llama, tmp_path):
    def interrupt(step, loss, gates):
        if step == 30:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train_gates(tiny_llama, sample, SHAPE, SETTINGS, tmp_path / "checkpoint", interrupt)

    with pytest.raises(ConfigError, match="is of a run with other settings"):
        train_gates(tiny_llama, sample, SHAPE, replace(SETTINGS, seed=1), tmp_path / "checkpoint")


def test_the_models_weights_stay_as_they_are(tiny_llama, tmp_path):
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}

    train_gates(tiny_llama, sample, SHAPE, replace(SETTINGS, steps=2), tmp_path / "checkpoint")

    assert all(weight.equal(before[name]) for name, weight in tiny_llama.state_dict().items())


def test_a_streaming_head_sees_sinks_and_the_newest_tokens():
    mask = streaming_mask(6, 1, 2, torch.device("cpu"))

    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


def test_our_full_attention_is_the_models_own(tiny_llama):
    ids = torch.arange(3, 40)[None]
    expected = tiny_llama(ids).logits

    with attending(tiny_llama, full_attention):
        found = tiny_llama(ids).logits

    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_layers_with_a_sliding_window_keep_it(tmp_path):
    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits

    with attending(model, full_attention):
        found = model(ids).logits

    torch.testing.assert_close(found, expected)


def test_what_our_attention_does_not_compute_is_refused():
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()

    with (
        attending(model, full_attention),
        pytest.raises(UnsupportedModelError, match="models with capped logits"),
    ):
        model(torch.arange(3, 40)[None])


def test_attention_under_a_mask_is_softmax_over_what_it_shows():
    query, key, value = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask = streaming_mask(5, 1, 2, torch.device("cpu"))

    found = Heads(0, query, key, value, 0.5, None).attend(mask)

    logits = (query @ key.transpose(-1, -2) * 0.5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(found, functional.softmax(logits, -1) @ value)


class Words:
    """A tokenizer of whole words, with a start and an end."""

    eos_token_id = 2

    def encode(self, text):
        return [1, *(3 + sum(map(ord, word)) for word in text.split())]


def test_a_document_is_drawn_by_its_step_and_its_answer_is_what_counts():
    one = draw_sample(Words(), length=600, seed=0, step=5)

    assert one.ids.equal(draw_sample(Words(), length=600, seed=0, step=5).ids)
    assert not one.ids.equal(draw_sample(Words(), length=600, seed=0, step=6).ids)
    assert not one.ids.equal(draw_sample(Words(), length=600, seed=1, step=5).ids)
    assert one.ids[one.first_answer] == Words().encode("answer:")[1]
    assert one.ids[-1] == 2
