"""The dense reference itself: right about Llama, and about what its rules drop."""

import ast
import time
from pathlib import Path

import pytest
import torch

from reference.dense import DenseLlama, DenseReference, Rule
from reference.tiny_model import random_llama, random_prompt

BUNDLED = Path(__file__).parents[2] / "vllm_kvpress" / "testbed" / "model"
BLOCK = 16
EVICTING = ("random", "knorm", "keydiff", "value_key_norm", "snapkv")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DenseLlama(random_llama(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def outputs(model):
    return DenseReference(model, Rule(BLOCK)).greedy(random_prompt(300), 40)


def hugging_face_logprobs(path, tokens, dtype=torch.float32):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(dtype)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def difference(one, other):
    return (one - other).abs().max().item()


def test_imports_nothing_that_it_checks():
    files = [file for file in Path(__file__).parent.glob("*.py") if file.stem[:5] != "test_"]
    assert len(files) >= 5
    for file in files:
        tree = ast.parse(file.read_text())
        names = {
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }

        assert not {name.split(".")[0] for name in names} & {"vllm", "vllm_kvpress"}


def test_without_eviction_equals_hugging_face_on_the_bundled_model():
    tokens = random_prompt(200, vocab=600)
    reference = DenseReference(DenseLlama(BUNDLED), Rule(BLOCK))

    ours = reference.logprobs(tokens[:150], tokens[150:]).logprobs

    # Random words are foreign to a trained model: float32 alone costs Hugging Face 2e-4 on them.
    truth = hugging_face_logprobs(BUNDLED, tokens, torch.float64)[149:-1]
    theirs = hugging_face_logprobs(BUNDLED, tokens)[149:-1]
    assert difference(ours, truth) < 2 * difference(theirs, truth) < 1e-3


def test_without_eviction_equals_hugging_face_on_a_random_model(tmp_path):
    path = random_llama(tmp_path / "model", layers=2, kv_heads=2, head_dim=32, seed=3)
    tokens = random_prompt(120)

    ours = DenseReference(DenseLlama(path), Rule(BLOCK)).logprobs(tokens[:90], tokens[90:]).logprobs

    assert difference(ours, hugging_face_logprobs(path, tokens)[89:-1]) < 5e-5


@pytest.mark.parametrize("scorer", ["full", "snapkv"])
def test_chunks_of_the_prompt_do_not_matter(model, outputs, scorer):
    prompt = random_prompt(300)
    reference = DenseReference(model, Rule(BLOCK, scorer, budget=96))
    steps = [(start, start + 1) for start in range(300, 339)]

    whole = reference.logprobs(prompt, outputs)
    chunked = reference.logprobs(prompt, outputs, [(0, 64), (64, 299), (299, 300), *steps])

    assert chunked.kept == whole.kept
    assert difference(chunked.logprobs, whole.logprobs) < 2e-5


@pytest.mark.parametrize("scorer", EVICTING)
def test_an_event_keeps_sinks_recent_tokens_and_whole_blocks(model, outputs, scorer):
    rule = Rule(BLOCK, scorer, budget=100, every=0 if scorer == "snapkv" else 24)

    kept = DenseReference(model, rule).logprobs(random_prompt(300), outputs).kept

    events = {event for event, _, _ in kept}
    assert events == ({300} if rule.every == 0 else {300, 324})
    for (event, _, _), positions in kept.items():
        tail = event % BLOCK
        assert len(positions) == (100 - tail) // BLOCK * BLOCK
        forced = {*range(4), *range(event - 64, event - tail)}
        assert forced <= set(positions) <= set(range(event - tail))


def test_heads_and_layers_choose_for_themselves(model, outputs):
    kept = DenseReference(model, Rule(BLOCK, "keydiff", budget=96)).logprobs(
        random_prompt(300), outputs
    )

    assert len({tuple(positions) for positions in kept.kept.values()}) == 16


@pytest.mark.parametrize("scorer", [*EVICTING, "window"])
def test_dropping_keys_shows_in_the_log_probabilities(model, outputs, scorer):
    prompt = random_prompt(300)
    full = DenseReference(model, Rule(BLOCK)).logprobs(prompt, outputs).logprobs

    ours = DenseReference(model, Rule(BLOCK, scorer, budget=96)).logprobs(prompt, outputs).logprobs

    assert difference(ours[0], full[0]) == 0.0
    assert difference(ours[1:], full[1:]) > 1e-2


def test_one_dropped_key_shows_in_the_log_probabilities(model, outputs):
    prompt = random_prompt(300)
    reference = DenseReference(model, Rule(BLOCK, "snapkv", budget=96))
    right = reference.logprobs(prompt, outputs)
    wrong = dict(right.kept)
    wrong[300, 0, 0] = wrong[300, 0, 0][:-1]

    again = reference.logprobs(prompt, outputs, forced_kept=[right.kept])
    sabotaged = reference.logprobs(prompt, outputs, forced_kept=[wrong])

    assert difference(again.logprobs, right.logprobs) == 0.0
    assert difference(sabotaged.logprobs, right.logprobs) > 1e-3


def test_a_prompt_within_the_budget_is_untouched(model, outputs):
    prompt = random_prompt(90)

    ours = DenseReference(model, Rule(BLOCK, "knorm", budget=200)).logprobs(prompt, outputs)

    full = DenseReference(model, Rule(BLOCK)).logprobs(prompt, outputs)
    assert ours.kept == {}
    assert difference(ours.logprobs, full.logprobs) == 0.0


def test_keep_ratio_is_of_the_prompt_and_never_below_the_least_budget():
    rule = Rule(BLOCK, "knorm", keep_ratio=0.25)

    assert rule.budget_of(1001) == 250
    assert rule.budget_of(200) == 4 + 64 + BLOCK - 1


def test_events_inside_one_chunk_collapse_into_the_last(model, outputs):
    prompt = random_prompt(300)
    reference = DenseReference(model, Rule(BLOCK, "knorm", budget=96, every=10))
    steps = [(start, start + 1) for start in range(325, 339)]

    replayed = reference.logprobs(prompt, outputs, [(0, 325), *steps])

    assert {event for event, _, _ in replayed.kept} == {320, 330}


def test_a_preempted_request_starts_over(model, outputs):
    prompt = random_prompt(300)
    reference = DenseReference(model, Rule(BLOCK, "knorm", budget=96))
    steps = [(start, start + 1) for start in range(300, 339)]

    # Preempted after position 308; the replay ends with the position of the next output.
    result = reference.logprobs(prompt, outputs, [(0, 300), *steps[:9], (0, 310), *steps[10:]])

    plain = reference.logprobs(prompt, outputs)
    full = DenseReference(model, Rule(BLOCK)).logprobs(prompt, outputs)
    assert difference(result.logprobs[:10], plain.logprobs[:10]) == 0.0
    assert difference(result.logprobs[10], full.logprobs[10]) < 2e-5
    assert difference(result.logprobs[10], plain.logprobs[10]) > 1e-3


def test_the_window_is_rounded_to_blocks_and_follows_the_chunk(model):
    prompt = random_prompt(200)
    outputs = random_prompt(3, seed=9)
    reference = DenseReference(model, Rule(BLOCK, "window", sinks=4, recent=60))

    ours = reference.logprobs(prompt, outputs).logprobs

    # Steps at 200 and 201 see [0, 16) and from floor((x - 60) / 16) * 16 = 128 on.
    seen = [*range(16), *range(128, 192)]
    everything = {(200, layer, head): seen for layer in range(4) for head in range(4)}
    same = DenseReference(model, Rule(BLOCK, "knorm", budget=96)).logprobs(
        prompt, outputs, forced_kept=[everything]
    )
    assert difference(ours, same.logprobs) < 1e-6


def test_is_fast_enough_to_be_called_in_every_test(model):
    reference = DenseReference(model, Rule(BLOCK, "knorm", budget=96, every=8))
    prompt = random_prompt(400)
    start = time.perf_counter()

    reference.logprobs(prompt, random_prompt(64, seed=1))

    assert time.perf_counter() - start < 10
