"""RazorAttention's token in the engine, in place of what a streaming head does not see."""

from dataclasses import replace

import pytest
from reference.dense import DenseLlama
from reference.heads import HeadRule
from reference.tiny_model import random_llama, random_prompt

from engine.cases import LENGTHS, NUM_OUTPUTS, mixed_prompts
from engine.child import Job, in_child
from engine.compare import FELT, TOLERANCE, compare
from engine.harness import BLOCK, Engine
from engine.test_processes import OUTPUTS, PREEMPTIONS, RUNNER
from vllm_kvpress.integration.head_attention import figures_of

CHUNK = 64
SINKS, RECENT = 4, 40
SINK_BLOCKS, WINDOW_BLOCKS = 1, 2
# One head of layer 0 is promoted, layer 1 has a lane of each kind and straddles a cut.
LABELS = ("1000", "1000", "0100", "0000")
EFFECTIVE = ("1100", "1000", "0100", "0000")
RUNS = (1, 3)
POLICY = {
    "sink_tokens": SINKS,
    "recent_tokens": RECENT,
    "heads": {"plan": "inline", "labels": LABELS, "compensation": True},
}
RULE = HeadRule(BLOCK, sinks=SINKS, recent=RECENT, labels=EFFECTIVE, compensated=True)


@pytest.fixture(scope="module")
def engine(tiny):
    engine = Engine(tiny, POLICY, num_gpu_blocks_override=20 * (1 + sum(RUNS)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.run(mixed_prompts(), NUM_OUTPUTS, chunk=CHUNK)


def check(traces, dense, rule=RULE):
    for trace in traces:
        comparison = compare(trace, dense, rule)

        assert comparison.error <= TOLERANCE, (len(trace.prompt), comparison)


def check_blocks(traces):
    """The block with sums stays one block longer than those whose tokens are seen."""
    for trace in traces:
        for (start, end), step in zip(trace.chunks, trace.held, strict=True):
            blocks = -(-end // BLOCK)
            gone = max(0, start // BLOCK - WINDOW_BLOCKS - 1 - SINK_BLOCKS)
            for kind, runs, held in (
                ("RetrievalSpec", RUNS[0], blocks),
                ("StreamSpec", RUNS[1], blocks - gone),
            ):
                ids = [len(ids) for name, ids in step.items() if name.startswith(kind)]
                assert sum(ids) == runs * held, (len(trace.prompt), start, end, kind)


def test_log_probabilities_equal_the_reference(mixed, dense):
    check(mixed, dense)
    check_blocks(mixed)


def test_mistakes_are_noticed(mixed, dense):
    mistakes = {
        "no token for the others": replace(RULE, compensated=False),
        "it counts once": replace(RULE, counted=False),
        "no sinks": replace(RULE, sinks=0),
        "a block more of window": replace(RULE, recent=WINDOW_BLOCKS * BLOCK + 1),
        "a block less of window": replace(RULE, recent=BLOCK),
        "another head": replace(RULE, labels=("1100", "1000", "1000", "0000")),
    }
    for what, mistake in mistakes.items():
        assert compare(mixed[LENGTHS.index(411)], dense, mistake).error > FELT, what


def test_no_request_holds_more_than_explain_says(engine, mixed):
    figures = figures_of(engine.runner.vllm_config)
    for trace, outputs in zip(mixed, NUM_OUTPUTS, strict=True):
        held = [sum(map(len, step.values())) for step in trace.held]

        assert max(held) <= figures.peak_blocks(len(trace.prompt), outputs - 1)
        assert held[-1] == figures.steady_blocks(len(trace.prompt), outputs - 1)


def test_the_caches_bytes_have_room_for_the_sums_and_little_more(engine):
    config = engine.runner.kv_cache_config
    row = 2 * 64 * 4  # key and value of a token in one head: 64 channels, float32
    specs = [group.kv_cache_spec.kv_cache_specs for group in config.kv_cache_groups]

    sizes = []
    for run in specs:
        kinds = {
            (type(spec).__name__, spec.page_size_bytes // spec.num_kv_heads)
            for spec in run.values()
        }
        assert kinds in ({("RetrievalSpec", BLOCK * row)}, {("StreamSpec", (BLOCK + 1) * row)})
        sizes.append(sum(spec.page_size_bytes for spec in run.values()))
    (size,) = {tensor.size for tensor in config.kv_cache_tensors}
    assert size == config.num_blocks * max(sizes)
    assert min(sizes) >= 0.95 * max(sizes)


@pytest.mark.parametrize("chunk", [33, 64, 100, 512])
def test_results_do_not_depend_on_where_a_prompt_is_cut(engine, dense, chunk):
    prompt = random_prompt(4 * chunk + 1 if chunk < 100 else 401, seed=chunk)

    (trace,) = engine.run([prompt], 40, chunk=chunk)

    start, end = trace.last_prefill
    assert end - start == (401 if chunk == 512 else 1)
    check([trace], dense)


def test_decode_far_past_the_prompt(engine, dense):
    """Blocks of generated tokens close, leave, and go into the sums."""
    (trace,) = engine.run([random_prompt(70, seed=5)], 400, chunk=CHUNK)

    check([trace], dense)
    check_blocks([trace])


def test_forced_preemption_in_prefill_and_in_decode(engine, dense):
    traces = engine.run(mixed_prompts(1), NUM_OUTPUTS, chunk=CHUNK, preempt_at=range(2, 200, 5))

    cuts = {
        end < len(trace.prompt)
        for trace in traces
        for (_, end), (start, _) in zip(trace.chunks, trace.chunks[1:], strict=False)
        if start < end
    }
    assert cuts == {True, False}
    check(traces, dense)
    check_blocks(traces)


def test_prefix_hits_carry_sums_along(engine, dense):
    prompt = random_prompt(9 * BLOCK + 5, seed=10)
    (first,) = engine.run([prompt], 40, chunk=CHUNK)
    again = engine.run([prompt, prompt], 40, chunk=CHUNK, arrive_at=[0, 3])
    (longer,) = engine.run([[*prompt, *first.outputs[:-1]]], 80, chunk=CHUNK)
    (other,) = engine.run([[*prompt[: 6 * BLOCK], *random_prompt(90, seed=14)]], 20, chunk=CHUNK)

    assert [trace.hits for trace in again] == [[9 * BLOCK], [9 * BLOCK]]
    assert longer.hits == [(len(prompt) + 39 - 1) // BLOCK * BLOCK]
    assert other.hits == [6 * BLOCK]
    check([first, *again, longer, other], dense)


@pytest.mark.full
def test_model_runner_v2(tiny, dense, tmp_path):
    runs = {
        "mixed": (mixed_prompts(), OUTPUTS, {"chunk": CHUNK}),
        "forced": (mixed_prompts(4), OUTPUTS, {"chunk": CHUNK, "preempt_at": PREEMPTIONS}),
    }
    options = {"num_gpu_blocks_override": 100}
    job = Job(str(tiny), runs, POLICY, options=options, runner="v2", asynchronous=True)

    report = in_child(job, tmp_path)

    assert RUNNER["v2"] in report.runner
    assert sum(trace.preemptions for trace in report.traces["forced"]) >= 3
    for traces in report.traces.values():
        check(traces, dense)


@pytest.mark.full
def test_heads_of_80_channels(engine_of, tmp_path):
    model = random_llama(tmp_path / "model", max_positions=512, head_dim=80)

    (trace,) = engine_of(POLICY, model, num_gpu_blocks_override=80).run(
        [random_prompt(300, seed=2)], 40, chunk=CHUNK
    )

    check([trace], DenseLlama(model))
