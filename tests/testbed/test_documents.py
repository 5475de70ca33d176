import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpress.testbed import model_path, resolve_model
from vllm_kvpress.testbed.documents import (
    TASKS,
    Question,
    Task,
    count_tokens,
    is_correct,
    make_document,
)

tokenizers = pytest.importorskip("tokenizers")

LONGEST_SENTENCE = 12


@pytest.fixture(scope="module")
def encode():
    tokenizer = tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


class ModelTokenizer:
    def __init__(self, encode):
        self.encode = encode


def whole_chat(document):
    """The prompt at a document's last question, as the model was trained on it."""
    *earlier, last = document.chat(len(document.questions) - 1)
    said = [
        f"{m['content']} answer:" if m["role"] == "user" else f"{m['content']}</s>" for m in earlier
    ]
    return " ".join([*said, f"{last['content']} answer:"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tokens", [256, 1000, 2048])
def test_prompt_fills_its_length_to_within_one_sentence(task, num_tokens, encode):
    for seed in range(8):
        document = make_document(task, num_tokens=num_tokens, seed=seed)
        length = len(encode(whole_chat(document)))
        assert num_tokens - LONGEST_SENTENCE < length <= num_tokens


@pytest.mark.parametrize("task", TASKS)
def test_own_token_count_is_the_tokenizers(task, encode):
    own = make_document(task, num_tokens=900, seed=5)
    assert make_document(task, num_tokens=900, seed=5, tokenizer=ModelTokenizer(encode)) == own
    prompt = own.prompt(own.questions[0])
    assert count_tokens(prompt) == len(encode(prompt))
    assert 3 not in encode(prompt), "a word is unknown to the model"


@pytest.mark.parametrize("task", TASKS)
def test_every_word_is_one_token_that_the_model_knows(task, encode):
    document = make_document(task, num_tokens=4096, seed=1)
    assert {
        word for word in re.findall(r"[a-z]+", document.text) if len(encode(word)) != 2
    } == set()


@given(task=st.sampled_from(TASKS), num_tokens=st.integers(700, 3000), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_same_arguments_give_the_same_document(task: Task, num_tokens: int, seed: int):
    first = make_document(task, num_tokens=num_tokens, seed=seed)
    assert make_document(task, num_tokens=num_tokens, seed=seed) == first
    assert make_document(task, num_tokens=num_tokens, seed=seed + 1) != first


@pytest.mark.parametrize("task", ["needle", "multi_key"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_answer_stands_once_and_at_its_depth(task, depth):
    for seed in range(8):
        document = make_document(task, num_tokens=2048, seed=seed, depth=depth)
        answer = document.questions[0].answer
        assert document.text.count(answer) == 1
        assert document.text.index(answer) / len(document.text) == pytest.approx(depth, abs=0.05)


def test_needle_asks_in_the_words_of_its_fact():
    document = make_document("needle", num_tokens=400, seed=2)
    (question,) = document.questions
    name = re.fullmatch(r"what is the pass code of (\w+)\?", question.text)[1]
    assert f"the pass code of {name} is this: {question.answer}." in document.text
    assert document.num_facts == 1
    assert document.prompt(question).endswith(f". {question.text} answer:")


def test_multi_key_hides_other_facts_of_the_same_form():
    for seed in range(8):
        document = make_document("multi_key", num_tokens=2048, seed=seed)
        facts = re.findall(r"the pass code of (\w+) is this: (\d{5})\.", document.text)
        assert len({name for name, _ in facts}) == len(facts) == document.num_facts
        assert 9 <= document.num_facts <= 33


def test_multi_value_answers_with_all_values_in_order():
    for seed in range(8):
        document = make_document("multi_value", num_tokens=1024, seed=seed)
        values = re.findall(r"number (\w+): (\d{5})\.", document.text)
        assert 2 <= len(values) == document.num_facts <= 4
        expected = ", ".join(f"{ordinal}: {value}" for ordinal, value in values)
        assert document.questions[0].answer == expected


def test_chain_leads_from_the_question_to_the_value():
    for seed in range(8):
        document = make_document("chain", num_tokens=1024, seed=seed)
        (question,) = document.questions
        assigned = dict(re.findall(r"(\w+)= (\w+);", document.text))
        name = re.fullmatch(r"what value has (\w+)\?", question.text)[1]
        trace = []
        while name in assigned:
            trace.append(f"{name}=")
            name = assigned[name]
        assert 2 <= len(trace) <= 3
        assert question.answer == f"{' '.join(trace)} {name}"
        assert not re.match(r"\w+=", document.text), "the model never saw a variable open a text"


def test_copy_asks_for_the_whole_passage():
    for seed in range(8):
        document = make_document("copy", num_tokens=1024, seed=seed)
        (question,) = document.questions
        name = re.fullmatch(r"repeat the passage of (\w+)\.", question.text)[1]
        words = question.answer.split()
        assert f"the passage of {name} is this: {question.answer}." in document.text
        assert 8 <= len(set(words)) == len(words) <= 24


def test_multi_turn_asks_about_other_facts_of_one_text():
    for seed in range(8):
        document = make_document("multi_turn", num_tokens=1024, seed=seed)
        facts = dict(re.findall(r"the pass code of (\w+) is this: (\d{5})\.", document.text))
        asked = [re.fullmatch(r"what is .* of (\w+)\?", q.text)[1] for q in document.questions]
        assert [facts[name] for name in asked] == [q.answer for q in document.questions]
        assert len(set(asked)) == 3
        assert len(facts) == document.num_facts == 8


def test_a_chat_grows_by_a_right_answer_and_a_question():
    document = make_document("multi_turn", num_tokens=512, seed=3)
    first, second, _ = document.questions
    assert document.chat() == [{"role": "user", "content": document.message(first)}]
    assert document.chat(1) == [
        *document.chat(0),
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.text},
    ]
    assert document.chat(2)[:3] == document.chat(1)


def test_earlier_documents_never_change():
    """Records name only task, length and seed."""
    digests = {
        task: hashlib.sha256(
            make_document(task, num_tokens=600, seed=11).text.encode()
        ).hexdigest()[:12]
        for task in ("needle", "multi_key", "multi_value", "chain")
    }
    assert digests == {
        "needle": "096a4b98b577",
        "multi_key": "d60be1815f97",
        "multi_value": "7cd4f7083568",
        "chain": "b313d5a16fe8",
    }


@pytest.mark.parametrize("generated", ["48213", " 48213 ", "48213\n"])
def test_is_correct_ignores_whitespace(generated):
    assert is_correct(Question("?", "48213"), generated)


@pytest.mark.parametrize("generated", ["", "4821", "482130", "48213 and more", "4 8213"])
def test_is_correct_refuses_anything_else(generated):
    assert not is_correct(Question("?", "48213"), generated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "needles", "num_tokens": 512}, "unknown task 'needles'; known: needle,"),
        ({"task": "needle", "num_tokens": 10}, "at least 128, got 10"),
        ({"task": "needle", "num_tokens": 512, "depth": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_document(**arguments, seed=0)


def test_short_name_means_the_bundled_model():
    assert resolve_model("testbed") == str(model_path())
    assert resolve_model("org/other") == "org/other"
    assert (model_path() / "model.safetensors").is_file()
