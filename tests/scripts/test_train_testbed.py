import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import train_testbed  # noqa: E402
from testbed_training.accuracy import BARS, Cell, hits, make_items, measure, missed  # noqa: E402
from testbed_training.card import write_card  # noqa: E402
from testbed_training.data import make_batch, make_row  # noqa: E402
from testbed_training.export import LARGEST_BYTES, folder_bytes, write_model  # noqa: E402
from testbed_training.heads import Heads, observe_heads  # noqa: E402
from testbed_training.loop import (  # noqa: E402
    CHECKPOINT,
    Place,
    Trainer,
    read_checkpoint,
    train,
    weighted_loss,
)
from testbed_training.model import (  # noqa: E402
    EMBEDDING,
    Shape,
    causal_attention,
    hidden_states,
)
from testbed_training.optimiser import orthogonalised  # noqa: E402
from testbed_training.processes import train_together  # noqa: E402
from testbed_training.schedule import Schedule  # noqa: E402
from testbed_training.structured import structured_weights  # noqa: E402
from testbed_training.vocabulary import END, PAD, START, encode, token_ids  # noqa: E402

from vllm_kvpress.testbed.documents import TASKS, count_tokens, make_document  # noqa: E402
from vllm_kvpress.testbed.language import NOUNS  # noqa: E402

IDS = token_ids()
SHAPE = Shape(vocab=len(IDS))
TINY = Schedule(minutes=1, steps=6, longest=128, tokens_per_step=256)


@pytest.fixture(scope="module")
def start():
    return structured_weights(SHAPE, seed=0)


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path, SHAPE, start)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def trainer(seed=0):
    return Trainer(SHAPE, TINY, seed, Place())


@pytest.mark.parametrize("length", [1, 63, 256, 500])
def test_attention_is_pytorchs(length):
    generator = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))

    output = causal_attention(*ours)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *theirs, is_causal=True, enable_gqa=True
    )
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(gradient)
    expected.backward(gradient)

    torch.testing.assert_close(output, expected)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_the_written_model_computes_what_was_trained(folder, start):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = make_batch("logits", 2, 200, 200)
    rounded = {name: weight.bfloat16().float() for name, weight in start.items()}

    with torch.no_grad():
        theirs = model(batch.ids).logits
        states = hidden_states(SHAPE, rounded, batch.ids, batch.positions)
        ours = states @ rounded[EMBEDDING].T

    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    assert folder_bytes(folder) < LARGEST_BYTES


def test_the_structured_start_copies_already(start):
    batch = make_batch("start", 8, 256, 256)

    with torch.no_grad():
        states = hidden_states(SHAPE, start, batch.ids, batch.positions)[:, :-1]
        guesses = (states @ start[EMBEDDING].T).argmax(-1)

    targets, answers = batch.ids[:, 1:], batch.is_answer[:, 1:]
    for words, share in (("0123456789", 0.7), ([f"▁{word}" for word in NOUNS], 0.8)):
        among = answers & torch.isin(targets, torch.tensor([IDS[word] for word in words]))
        assert (guesses == targets)[among].float().mean() > share


def test_the_tokenizer_reads_and_writes_the_language(tokenizer):
    for task in TASKS:
        document = make_document(task, num_tokens=600, seed=1)
        question = document.questions[0]
        prompt = document.prompt(question)
        ids = tokenizer.encode(prompt)
        assert ids == [START, *encode(prompt, IDS)]
        assert len(ids) == count_tokens(prompt)
        assert tokenizer.decode(encode(f" {question.answer}", IDS)).strip() == question.answer
        chat = tokenizer.apply_chat_template(document.chat(), tokenize=False)
        assert tokenizer.encode(chat, add_special_tokens=False) == ids


def test_other_text_is_spelled_not_lost(tokenizer):
    assert tokenizer.decode(tokenizer.encode("Zürich")[1:]) == "zürich"


@pytest.mark.parametrize("length", [128, 512])
def test_a_row_is_full_and_learns_answers_alone_in_full(length, tokenizer):
    rng = random.Random(3)
    for _ in range(8):
        ids, positions, weights = make_row(rng, length, 8192, IDS)
        assert len(ids) == len(positions) == len(weights) == length
        assert ids[0] == START
        assert ids.count(PAD) < 16
        assert all(later > earlier for earlier, later in pairwise(positions))
        assert positions[-1] < 8192
        ends = [weight for token, weight in zip(ids, weights, strict=True) if token == END]
        assert set(ends) <= {1.0}
        before = tokenizer.decode(ids).split("answer:")[0]
        guessed = [
            weight
            for token, weight in zip(ids[: len(tokenizer.encode(before))], weights, strict=False)
            if tokenizer.decode([token]).strip().isdigit()
        ]
        assert set(guessed) <= {0.0}


def test_rows_differ_between_steps_and_processes_and_nothing_else():
    first = make_batch("0/0/1", 2, 128, 8192)

    again = make_batch("0/0/1", 2, 128, 8192)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.weights, again.weights)
    for seed in ("0/1/1", "0/0/2", "1/0/1"):
        assert not torch.equal(first.ids, make_batch(seed, 2, 128, 8192).ids)


def test_an_interrupted_training_ends_like_another_one(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for path in (whole, halves):
        path.mkdir()

    train(trainer(), whole)
    train(trainer(), halves, stop_at=3)
    assert read_checkpoint(halves)["step"] == 3
    train(trainer(), halves)

    expected, found = read_checkpoint(whole), read_checkpoint(halves)
    assert expected["step"] == found["step"] == 6
    for name, weight in expected["optimiser"]["masters"].items():
        assert torch.equal(weight, found["optimiser"]["masters"][name]), name
    assert [path.name for path in halves.iterdir()] == [CHECKPOINT]


def test_another_seed_does_not_go_on(tmp_path):
    train(trainer(), tmp_path, stop_at=1)

    with pytest.raises(ValueError, match=r"made with .*remove it"):
        train(trainer(seed=1), tmp_path)


def test_training_lowers_the_loss(start, tmp_path):
    train(trainer(), tmp_path)

    trained = read_checkpoint(tmp_path)["optimiser"]["masters"]
    batch = make_batch("loss", 4, 128, 128)
    with torch.no_grad():
        before, after = (weighted_loss(SHAPE, w, batch)[0].item() for w in (start, trained))
    assert after < before - 0.2


def test_the_schedule_goes_by_time_or_by_steps():
    by_time, by_steps = Schedule(minutes=10), Schedule(minutes=10, steps=100)

    assert by_time.share(5, 300) == 0.5
    assert by_steps.share(25, 300) == 0.25
    assert [by_time.length(share) for share in (0, 0.2, 0.5, 0.9)] == [256, 512, 1024, 2048]
    assert by_time.rate(0.3, 100) == 1.0
    assert by_time.rate(0.0, 0) < 0.1
    assert by_time.rate(1.0, 900) == pytest.approx(0.02)


def test_updates_of_matrices_are_orthogonal():
    tall = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))

    values = torch.linalg.svdvals(orthogonalised(tall).float())

    assert orthogonalised(tall).shape == tall.shape
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_hits_are_those_of_each_document_alone(folder, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    items = [*make_items("steps", 300, 1, tokenizer), *make_items("multi_turn", 300, 1, tokenizer)]

    together = hits(model, items)

    for item, found in zip(items, together, strict=True):
        assert torch.equal(hits(model, [item])[0], found)
        assert len(found) == sum(end - start for start, end in item.answers)
    assert len(items[1].answers) == 3


def test_an_interrupted_measurement_goes_on(folder, tokenizer, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    known = tmp_path / "accuracy.json"
    first = measure(model, tokenizer, {200: 1}, known)
    done = [{**cell, "right": 7} for cell in json.loads(known.read_text())]
    known.write_text(json.dumps(done))

    more = measure(model, tokenizer, {200: 1, 256: 1}, known)

    assert [cell.task for cell in first] == list(TASKS)
    assert [cell.right for cell in more if cell.length == 200] == [7] * len(TASKS)
    assert {cell.length for cell in more} == {200, 256}
    assert len(json.loads(known.read_text())) == len(more) == 2 * len(TASKS)


def test_a_missed_bar_is_named():
    good = [Cell(task, length, 100, 100) for length, task in BARS]
    bad = Cell("needle", 2048, 100, 97)

    assert missed(good) == []
    assert missed([*good[1:], bad]) == ["needle at 2048 tokens: 97.0%, the bar is 98%"]
    assert 0 < good[0].error < 0.02


def test_heads_that_answers_need_are_not_streaming():
    order = [(0, 0), (0, 1), (1, 0), (1, 1)]
    trials = [1.0, 0.5, 0.99, 0.9]
    heads = Heads([[0.5, 0.1]], [[0.0]], 1.0, order, trials, [0.5], 100, 64)

    assert heads.streaming == [(0, 0), (1, 0)]
    assert heads.retrieval == [(0, 1), (1, 1)]
    assert heads.num_sinks == 1


def test_the_card_is_written_from_what_was_measured(folder, tokenizer):
    heads = observe_heads(folder, SHAPE, make_items("needle", 200, 1, tokenizer), 200)
    cells = [Cell(task, length, 50, 49) for task in TASKS for length in (1024, 2048)]
    training = {
        "command": "python scripts/train_testbed.py --out DIR",
        "steps": 6,
        "minutes": 1.0,
        "longest": 128,
        "hardware": "1 core",
        "words": 300,
    }

    write_card(folder, SHAPE, cells, heads, parameters=1000, training=training)

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| `steps` | 98.0 % (2.7) | 98.0 % (2.7) |" in card
    assert "`alice has the pass code 48213.`" in card
    assert "{" not in card
    assert len(heads.order) == len(heads.trials) == 16


def test_measuring_needs_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train_testbed, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["train_testbed.py", "--out", str(tmp_path), "--eval-only"])

    with pytest.raises(SystemExit, match="no checkpoint: train first"):
        train_testbed.main()
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.full
def test_processes_train_together(tmp_path):
    train_together(SHAPE, TINY, 0, tmp_path)

    assert read_checkpoint(tmp_path)["step"] == TINY.steps
