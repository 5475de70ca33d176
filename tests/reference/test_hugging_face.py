"""Both references say the same, though only one of them has a model of its own."""

import pytest

from reference.dense import DenseLlama, DenseReference, Rule
from reference.hugging_face import HuggingFaceReference, load
from reference.tiny_model import random_llama, random_prompt

BLOCK = 16
STOP = 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def dense(path):
    return DenseLlama(path)


@pytest.fixture(scope="module")
def hugging_face(path):
    return load(path)


@pytest.mark.parametrize(
    "scorer", ["full", "window", "random", "knorm", "keydiff", "value_key_norm", "snapkv"]
)
def test_a_pruned_cache_says_what_a_masked_one_says(scorer, dense, hugging_face):
    prompt = random_prompt(300)
    rule = Rule(BLOCK, scorer, budget=100)

    answer = HuggingFaceReference(hugging_face, rule).answer(prompt, 30, stop=STOP)

    masked = DenseReference(dense, rule).logprobs(prompt, answer.outputs, forced_kept=[answer.kept])
    assert masked.kept == answer.kept
    assert max(masked.flips, default=0.0) <= 1e-4
    assert (masked.logprobs - answer.logprobs).abs().max() <= 1e-4
    assert bool(answer.kept) == (scorer not in ("full", "window"))


def test_given_outputs_are_read_and_then_the_model_goes_on(hugging_face):
    prompt, rest = random_prompt(300), random_prompt(10, seed=1)
    reference = HuggingFaceReference(hugging_face, Rule(BLOCK))

    late = reference.answer(prompt, 20, stop=STOP, given=rest)

    whole = reference.answer([*prompt, *rest], 10, stop=STOP)
    assert late.outputs == [*rest, *whole.outputs]
    assert (late.logprobs[10:] - whole.logprobs).abs().max() <= 1e-4


def test_an_answer_ends_with_the_stop_token(hugging_face):
    reference = HuggingFaceReference(hugging_face, Rule(BLOCK))
    outputs = reference.answer(random_prompt(50), 20, stop=STOP).outputs

    stopped = reference.answer(random_prompt(50), 20, stop=outputs[7])

    assert stopped.outputs == outputs[: outputs.index(outputs[7]) + 1]
    assert len(stopped.logprobs) == len(stopped.outputs)
