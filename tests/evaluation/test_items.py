import pytest

from vllm_kvpress.evaluation.items import (
    DEPTHS,
    answer_tokens,
    is_right,
    make_items,
    num_prompts,
)
from vllm_kvpress.testbed import model_path
from vllm_kvpress.testbed.documents import TASKS, Question

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(model_path())


def items_of(task, tokenizer, model="testbed", **changes):
    arguments = {"limit": 4, "seed": 0, "tokenizer": tokenizer, "model": model, **changes}
    return make_items(task, 600, **arguments)


def test_a_late_question_is_taken_from_the_prompt_s_end(tokenizer):
    for now, late in zip(
        items_of("multi_value", tokenizer), items_of("late_multi_value", tokenizer), strict=True
    ):
        assert late.document == now.document
        assert late.prompts[0] + late.late == now.prompts[0]
        question = now.document.questions[0].text
        assert tokenizer.decode(late.late).replace(" ?", "?").startswith(question)
        assert now.late == ()


def test_a_prompt_is_the_text_that_the_document_says(tokenizer):
    for task in TASKS:
        for item in items_of(task, tokenizer):
            prompt = item.document.prompt(item.document.questions[0])
            assert list(item.prompts[0]) == tokenizer.encode(prompt)


def test_needles_with_late_questions_have_depths(tokenizer):
    assert [item.depth for item in items_of("late_needle", tokenizer)] == list(DEPTHS[:4])


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fit_their_length_and_answers_their_room(task, tokenizer):
    for item in items_of(task, tokenizer):
        assert 580 < len(item.prompts[-1]) <= 600
        for question in item.document.questions:
            # One more for the end of the text.
            assert len(tokenizer.encode(question.answer)) <= answer_tokens(task, "testbed")


def test_a_later_prompt_goes_on_from_the_one_before(tokenizer):
    (item, *_) = items_of("multi_turn", tokenizer)

    assert len(item.prompts) == 3
    for earlier, later in zip(item.prompts, item.prompts[1:], strict=False):
        assert later[: len(earlier)] == earlier
        assert later.count(tokenizer.eos_token_id) == earlier.count(tokenizer.eos_token_id) + 1


def test_a_survey_asks_each_question_by_itself_about_one_text(tokenizer):
    (item, *_) = items_of("survey", tokenizer)

    assert len(item.prompts) == len(set(item.prompts)) == num_prompts("survey") == 8
    text = tokenizer.encode(item.document.text, add_special_tokens=False)
    for prompt in item.prompts:
        assert list(prompt[1 : 1 + len(text)]) == text
        assert tokenizer.eos_token_id not in prompt


def test_needles_stand_at_every_depth(tokenizer):
    items = items_of("needle", tokenizer, limit=11)

    assert sorted(item.depth for item in items) == sorted(DEPTHS) == [i / 10 for i in range(11)]
    for item in items:
        text, answer = item.document.text, item.document.questions[0].answer
        assert text.index(answer) / len(text) == pytest.approx(item.depth, abs=0.1)


def test_a_seed_draws_the_same_documents_again_and_another_one_others(tokenizer):
    first = [item.document.text for item in items_of("multi_key", tokenizer)]

    assert [item.document.text for item in items_of("multi_key", tokenizer)] == first
    others = items_of("multi_key", tokenizer, seed=1)
    assert not {item.document.text for item in others} & set(first)


def test_other_models_are_asked_through_their_chat_template(tokenizer):
    (item, *_) = items_of("needle", tokenizer, model="org/other")

    text = tokenizer.decode(item.prompts[0])
    assert text.count(tokenizer.bos_token) == 1
    assert "nothing but what is asked for" in text.replace(" ?", "")


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("48213", "The pass code of Alice is 48213.", True),
        ("48213", "482130", False),
        ("48213", "I do not know.", False),
        ("one: 11111, two: 22222", "1. 11111 and then 22222", True),
        ("one: 11111, two: 22222", "22222, 11111", False),
        ("kip= zor= 48213", "kip has the value 48213", True),
        ("garden old river", "Here it is: Garden, old river!", True),
        ("garden old river", "garden river", False),
    ],
)
def test_other_models_may_say_more_than_the_answer(answer, text, right):
    assert is_right(Question("?", answer), text, "org/other") is right


def test_the_bundled_model_must_say_the_answer_alone():
    assert is_right(Question("?", "48213"), " 48213 ", "testbed")
    assert not is_right(Question("?", "48213"), "48213 48213", "testbed")
