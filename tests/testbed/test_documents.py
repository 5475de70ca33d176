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
from vllm_kvpress.testbed.language import (
    ADJECTIVES,
    ADVERBS,
    NAMES,
    NOUNS,
    NUMBERED_FACTS,
    NUMBERED_QUESTIONS,
    ORDINALS,
    PASS_CODE_FACTS,
    PASS_CODE_QUESTIONS,
    PASSAGE_FACTS,
    PASSAGE_QUESTIONS,
    PLACES,
    VALUE_QUESTIONS,
    VARIABLES,
    VERBS,
    WORDINGS,
)

tokenizers = pytest.importorskip("tokenizers")

LONGEST_SENTENCE = 12


@pytest.fixture(scope="module")
def encode():
    tokenizer = tokenizers.Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def pattern(wording, value=r"\d{5}"):
    fields = {"{key}": r"(\w+)", "{ordinal}": "(?:one|two|three|four)", "{value}": f"({value})"}
    found = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    for field, expression in fields.items():
        found = found.replace(field, expression)
    return re.compile(found)


def facts_in(text, wordings, value=r"\d{5}"):
    """Key and value of every fact, in the order of the text; a key that has two stands twice."""
    found = {
        match.span(2): match.groups()
        for wording in wordings
        for match in pattern(wording, value).finditer(text)
    }
    return [found[span] for span in sorted(found)]


def key_of(question, wordings):
    (found,) = {
        match[1] for wording in wordings if (match := pattern(wording).fullmatch(question.text))
    }
    return found


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


def test_needle_asks_for_its_fact():
    document = make_document("needle", num_tokens=400, seed=2)
    (question,) = document.questions
    name = key_of(question, PASS_CODE_QUESTIONS)
    assert facts_in(document.text, PASS_CODE_FACTS) == [(name, question.answer)]
    assert document.num_facts == 1
    assert document.prompt(question).endswith(f". {question.text} answer:")


def test_multi_key_hides_other_facts_of_the_same_form():
    for seed in range(8):
        document = make_document("multi_key", num_tokens=2048, seed=seed)
        facts = facts_in(document.text, PASS_CODE_FACTS)
        assert len({name for name, _ in facts}) == len(facts) == document.num_facts
        assert 9 <= document.num_facts <= 33
        (question,) = document.questions
        assert dict(facts)[key_of(question, PASS_CODE_QUESTIONS)] == question.answer


def test_multi_value_answers_with_all_values_in_order():
    for seed in range(8):
        document = make_document("multi_value", num_tokens=1024, seed=seed)
        (question,) = document.questions
        facts = facts_in(document.text, NUMBERED_FACTS)
        ordinals = re.findall(r" number (\w+)", document.text)
        assert 2 <= len(facts) == len(ordinals) == document.num_facts <= 4
        assert {name for name, _ in facts} == {key_of(question, NUMBERED_QUESTIONS)}
        pairs = zip(ordinals, facts, strict=True)
        assert question.answer == ", ".join(f"{ordinal}: {code}" for ordinal, (_, code) in pairs)


@pytest.mark.parametrize(("task", "least", "most"), [("chain", 2, 3), ("steps", 24, 40)])
def test_a_chain_leads_from_the_question_to_the_value(task, least, most):
    for seed in range(8):
        document = make_document(task, num_tokens=1024, seed=seed)
        (question,) = document.questions
        assigned = dict(re.findall(r"(\w+)= (\w+);", document.text))
        assert len(assigned) == document.num_facts
        name = key_of(question, VALUE_QUESTIONS)
        trace = []
        while name in assigned:
            trace.append(f"{name}=")
            name = assigned[name]
        assert least <= len(trace) <= most
        assert question.answer == f"{' '.join(trace)} {name}"


def test_steps_take_long_answers():
    lengths = [
        count_tokens(make_document("steps", num_tokens=2048, seed=seed).questions[0].answer)
        for seed in range(20)
    ]
    assert min(lengths) >= 55
    assert max(lengths) > 75


def test_a_fact_may_open_the_text():
    documents = [make_document("steps", num_tokens=400, seed=seed) for seed in range(20)]
    assert any(document.text.split("=")[0] in VARIABLES for document in documents)


def test_copy_asks_for_the_whole_passage():
    for seed in range(8):
        document = make_document("copy", num_tokens=1024, seed=seed)
        (question,) = document.questions
        words = question.answer.split()
        name = key_of(question, PASSAGE_QUESTIONS)
        assert facts_in(document.text, PASSAGE_FACTS, "[a-z ]+") == [(name, question.answer)]
        assert 8 <= len(set(words)) == len(words) <= 24


def test_multi_turn_asks_about_other_facts_of_one_text():
    for seed in range(8):
        document = make_document("multi_turn", num_tokens=1024, seed=seed)
        facts = dict(facts_in(document.text, PASS_CODE_FACTS))
        asked = [key_of(question, PASS_CODE_QUESTIONS) for question in document.questions]
        assert [facts[name] for name in asked] == [q.answer for q in document.questions]
        assert len(set(asked)) == 3
        assert len(facts) == document.num_facts == 8


def test_many_questions_may_be_asked_about_one_text():
    for seed in range(8):
        document = make_document("multi_key", num_tokens=700, seed=seed, num_questions=9)
        facts = dict(facts_in(document.text, PASS_CODE_FACTS))
        asked = [key_of(question, PASS_CODE_QUESTIONS) for question in document.questions]
        assert [facts[name] for name in asked] == [q.answer for q in document.questions]
        assert len(set(asked)) == 9
        assert max(count_tokens(document.prompt(q)) for q in document.questions) <= 700
        first = make_document("multi_key", num_tokens=700, seed=seed).questions[0]
        assert document.questions[0] == first


def test_no_more_questions_than_facts():
    with pytest.raises(ValueError, match="the text answers 1 questions, not 2"):
        make_document("needle", num_tokens=300, seed=0, num_questions=2)


def test_facts_and_questions_are_worded_in_every_way():
    documents = [
        make_document(task, num_tokens=700, seed=seed) for task in TASKS for seed in range(40)
    ]
    text = " ".join(f"{d.text} {question.text}" for d in documents for question in d.questions)
    unused = [
        wording for wording in WORDINGS if not pattern(wording, r"\d{5}|[a-z ]+").search(text)
    ]
    assert unused == []


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_value_comes_after_its_key(wording):
    value = wording.find("{value}")
    assert value == -1 or 0 <= wording.find("{key}") < value


def test_keys_are_no_other_words():
    others = {*NOUNS, *ADJECTIVES, *VERBS, *ADVERBS, *PLACES, *ORDINALS}
    others |= set(re.findall(r"\b[a-z]+\b", re.sub(r"{\w+}", "", " ".join(WORDINGS))))
    assert len({*NAMES, *VARIABLES} - others) == len(NAMES) + len(VARIABLES)


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
        for task in TASKS
    }
    assert digests == {
        "needle": "7e494fa9cc6f",
        "multi_key": "ff049fe75a82",
        "multi_value": "dc50d475e8de",
        "chain": "09128813b57a",
        "steps": "4a8730b9158e",
        "copy": "38c2a1ce2313",
        "multi_turn": "82a4393c6aaf",
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
