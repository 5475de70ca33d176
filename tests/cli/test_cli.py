import json
import re

import pytest

from vllm_kvpress.cli import main
from vllm_kvpress.config import load_policy
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.policies import resolve

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    """Writes a model folder that holds nothing but a config.json."""

    def write(**changes):
        config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def run(capsys):
    """Runs the command and returns (exit code, stdout, stderr)."""

    def command(*words):
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def figures(text, row):
    """The two numbers of one row of explain's table."""
    line = next(line for line in text.splitlines() if line.startswith(row))
    return [float(word.replace(",", "")) for word in re.findall(r"[\d,.]+", line.removeprefix(row))]


def test_policies_prints_a_line_each_with_the_paper(run):
    code, out, err = run("policies")

    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert len(lines) == 20
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert re.search(r"^snapkv +.*\[arXiv 2404\.14469, SnapKV", out, re.MULTILINE)


def test_check_prints_the_policy_in_full(run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: snapkv\nevict: {budget: {keep_ratio: 0.5}}\n")

    code, out, _ = run("check", str(file))

    assert code == 0
    assert "name: mine\n" in out
    assert "keep_ratio: 0.5\n" in out
    assert "SnapKVScorer(window=32, pool=5, pooling='avg')" in out
    assert run("check", "int4")[1].endswith("; its scorer: none, nothing is ranked\n")


def test_what_check_prints_of_a_name_is_a_policy_file(run, tmp_path):
    file = tmp_path / "mine.yaml"

    file.write_text(run("check", "snapkv:window=48")[1])

    assert load_policy(file).evict == load_policy("snapkv:window=48").evict


def test_what_check_prints_is_a_policy_file_again(run, tmp_path):
    first = tmp_path / "snapkv.yaml"
    first.write_text("base: snapkv\n")
    second = tmp_path / "again.yaml"

    second.write_text(run("check", str(first))[1])

    assert load_policy(second).to_json() == load_policy("snapkv").to_json()


def test_explain_takes_every_figure_from_the_plan(run, model):
    code, out, err = run(
        "explain", "snapkv", "--model", model(), "--prompt-tokens", "8000",
        "--output-tokens", "500", "--block-size", "16",
    )  # fmt: skip

    policy = load_policy("snapkv")
    # One query takes 32 heads of 128 channels; a page has 16 * 2 * 8 * 128 elements.
    plan = RetentionPlan.from_policy(policy, resolve(policy), block_size=16, queries_per_block=8)
    full = -(-8500 // 16)
    steady, peak = plan.steady_blocks(8000, 500), plan.peak_blocks(8000, 500)
    running = 1 + (10 * full - peak) // steady
    assert (code, err) == (0, "")
    assert figures(out, "bytes per token held") == [131072, 131072]
    assert figures(out, "blocks at most") == [full, peak]
    assert figures(out, "blocks while it generates") == [full, steady]
    assert figures(out, "blocks in ")[1:] == [10 * full, 10 * full]
    assert figures(out, "requests at once there") == [10, running]
    assert figures(out, "tokens that attention reads") == [
        8500,
        plan.physical_tokens(8000, 8499, 8500),
    ]
    assert steady < full / 4
    assert "the first 4 and the newest 64 tokens" in out
    assert "SnapKVScorer(window=32, pool=5, pooling='avg'), which reads keys, queries" in out


def test_explain_counts_bytes_where_an_8_bit_cache_has_twice_the_blocks(run, model):
    words = ("--model", model(), "--prompt-tokens", "8000", "--output-tokens", "500")
    plain, quantized = run("explain", "snapkv", *words)[1], run("explain", "snapkv-fp8", *words)[1]
    option = run("explain", "snapkv", *words, "--", "--kv-cache-dtype", "fp8")[1]

    assert figures(quantized, "bytes per token held") == [131072, 65536]
    _, blocks, twice = figures(quantized, "blocks in ")
    assert twice == 2 * blocks
    assert figures(quantized, "blocks while it generates") == figures(
        plain, "blocks while it generates"
    )
    assert "precision     fp8" in quantized
    assert figures(option, "requests at once there") == figures(quantized, "requests at once there")
    assert (
        figures(option, "requests at once there")[1] > figures(plain, "requests at once there")[1]
    )


def test_explain_counts_the_cells_of_packed_stores(run, model):
    words = ("--model", model(), "--prompt-tokens", "8000", "--output-tokens", "500")
    _, out, _ = run("explain", "kivi2", *words)

    assert figures(out, "bytes per token held") == [131072, 131072]
    # 96 bytes a head of 128 channels, in place of 512.
    assert re.search(r"^bytes per token packed +- +24,576$", out, re.MULTILINE)
    # 8352 of 8500 tokens are closed: 261 cells of each head, 21 to a block; ten blocks are open.
    assert figures(out, "blocks while it generates") == [532, -(-261 * 8 // 21) + 10]
    assert "nothing of it is evicted" not in out
    assert "keys kivi2, values kivi2" in out
    assert "the newest 128 to 159 tokens" in out


def test_explain_counts_both_stores_of_a_policy_that_demotes(run, model):
    words = ("--model", model(), "--prompt-tokens", "8000", "--output-tokens", "500")
    _, out, _ = run("explain", "snapkv-demote", *words)

    # 160 bytes a head of 128 channels for survivors, 96 for losers.
    assert re.search(r"^bytes per token packed +- +40,960$", out, re.MULTILINE)
    assert re.search(r"^bytes per token demoted +- +24,576$", out, re.MULTILINE)
    # 2000 tokens survive, 6000 go: 187 groups of 32, so 2016 stay. 496 of the answer's are closed.
    survivors = -(-((2016 + 496) // 16) * 8 // 25)
    assert figures(out, "blocks while it generates") == [532, survivors + -(-187 * 8 // 21) + 1]
    assert figures(out, "tokens that attention reads") == [8500, 8500]
    assert "of the others  keys kivi2, values kivi2" in out
    assert "no token is evicted" in out
    assert "nothing of it is evicted" not in out


def test_explain_counts_the_blocks_of_skipped_layers(run, model, tmp_path):
    words = ("--model", model(), "--prompt-tokens", "8000", "--output-tokens", "500")
    file = tmp_path / "mine.yaml"
    file.write_text("base: snapkv\nlayers: {skip: [0, 1]}\n")
    plain, out = run("explain", "snapkv", *words)[1], run("explain", str(file), *words)[1]

    _, blocks = figures(plain, "blocks while it generates")
    # Two layers of 32: blocks of 208 tokens, 13 times those of the 30 others.
    assert figures(out, "blocks while it generates") == [532, blocks + -(-8500 // 208)]
    assert figures(out, "bytes per token held") == [131072, 131072]
    assert "layers 0, 1, every token, in blocks of 208 tokens" in out
    _, stock, pool = figures(out, "blocks in ")
    assert pool == stock * 32 // 30


def test_explain_of_a_layer_that_the_model_does_not_have(run, model, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: snapkv\nlayers: {skip: [32]}\n")

    code, _, err = run("explain", str(file), "--model", model())

    assert (code, err.count("\n")) == (2, 1)
    assert "layers.skip names a layer that the model does not have; got [32]" in err


def test_explain_counts_packed_blocks_where_tokens_are_packed_as_they_are_written(run, model):
    words = ("--model", model(), "--prompt-tokens", "8000", "--output-tokens", "500")
    _, out, _ = run("explain", "int8", *words)
    window = '{"base": "streaming_llm", "quantize": {"keys": "int8", "values": "int8"}}'
    _, windowed, _ = run("explain", window, *words)

    # 264 bytes a head of 128 channels in place of 512, 8 heads in 32 layers; blocks of 16 tokens.
    assert figures(out, "bytes per token held") == [131072, 8 * 32 * 264]
    assert "bytes per token packed" not in out
    assert figures(out, "blocks at most") == [532, 532]
    assert figures(out, "blocks while it generates") == [532, 532]
    assert figures(out, "blocks in ")[1:] == [5320, 5320 * 512 // 264]
    assert figures(out, "requests at once there") == [10, 5320 * 512 // 264 // 532]
    assert "the longest prompt that fits grows" in out
    assert figures(windowed, "bytes per token held") == [131072, 8 * 32 * 264]
    assert figures(windowed, "blocks while it generates")[1] < 532 // 4
    assert "prefilled in packed blocks" in windowed


@pytest.mark.parametrize("policy", ["streaming_llm", "random", "knorm", "keydiff", "snapkv"])
def test_explain_works_for_every_policy_on_the_bundled_model(run, policy):
    code, out, err = run("explain", policy, "--model", "testbed")

    assert (code, err) == (0, "")
    assert "4 full-attention layers, 4 KV heads of 64 channels, bfloat16" in out
    before, after = figures(out, "requests at once there")
    assert after > before


def test_explain_shows_which_heads_of_a_plan_retrieve(run, tmp_path):
    file = tmp_path / "duo.tsv"
    file.write_text("\n".join(["0\t0\t0\t0", "0\t1\t1\t1", "0\t0\t0\t0", "0\t0\t0\t1"]))

    code, out, err = run("explain", f"duo:file={file},threshold=0.5", "--model", "testbed")

    assert (code, err) == (0, "")
    assert "4 of 16 KV heads keep every token, the others the first 64 and the newest 256" in out
    assert re.search(r"0  0000\n +1  0111\n +2  0000\n +3  0001\n", out)
    assert "A block holds 4 heads, 0.0% of it is padding; cache groups: 1 of retrieval" in out
    # 4096 prompt tokens in blocks of 16, 4 of 16 heads whole, the others 4 + 16 + 1 blocks.
    held = (4 * 272 + 12 * (4 + 16 + 1)) * 16 * 2 * 64 * 2 / 2**20
    assert re.search(rf"memory while it generates +17.0 MiB +{held:.1f} MiB", out)


def test_explain_counts_the_sums_of_compensation(run):
    plan = "duo:plan=random,retrieval_ratio=0.5"
    words = ("--model", "testbed", "--prompt-tokens", "3000")
    plain = run("explain", plan, *words)[1]
    code, out, err = run("explain", f"{plan},compensation=true", *words)

    assert (code, err) == (0, "")
    assert "and one token for all others. By layer" in out
    # 8 and 8 heads of bfloat16: two rows of sums to 16 tokens, one block longer.
    assert "A block holds 9 heads, 5.6% of it is padding" in out
    assert (
        figures(out, "bytes per further token")[1]
        == 9 / 8 * figures(plain, "bytes per further token")[1]
    )


def test_explain_counts_a_windowed_prefill_as_a_plan_whose_heads_all_stream(run):
    words = ("--model", "testbed", "--prompt-tokens", "3000")
    _, short, _ = run("explain", "streaming_llm:prefill=windowed,tokens=256", *words)
    _, long, _ = run("explain", "streaming_llm:prefill=windowed,tokens=256", *words[:-1], "3800")
    small = ("--", "--max-num-batched-tokens", "512")
    steps = [
        run("explain", "streaming_llm:prefill=windowed,tokens=256", *words, *small, *more)[1]
        for more in ((), ("--no-async-scheduling",), ("--async-scheduling", "false"))
    ]
    exact = run("explain", "streaming_llm:tokens=256", *words)[1]

    assert "Every KV head keeps the first 4 and the newest 252 tokens, in whole blocks." in short
    assert figures(short, "bytes per further token") == [4096, 0]
    assert (
        figures(short, "memory while it generates")[1]
        == (figures(long, "memory while it generates")[1])
    )
    # Sinks, window, the open block, and what two steps compute, or one.
    block = 16 * 4096 / 2**20
    assert ["1024 tokens in flight" in out for out in steps] == [True, False, False]
    peaks = [figures(out, "memory at most")[1] for out in steps]
    assert peaks == [round(block * (18 + flying // 16), 1) for flying in (1024, 512, 512)]
    assert "prefilled exactly" in exact
    assert "prefilled exactly" not in short


def test_explain_counts_packed_bytes_under_a_head_plan(run):
    words = ("--model", "testbed", "--prompt-tokens", "3000")
    code, out, err = run("explain", "duo-int4:plan=random,retrieval_ratio=0.25", *words)
    _, exact, _ = run("explain", "duo:plan=random,retrieval_ratio=0.25", *words)

    assert (code, err) == (0, "")
    # 64 channels: 32 bytes of codes and 2 groups' scales and zeros, for keys and for values.
    packed = 2 * (64 // 2 + 2 * 4)
    assert figures(out, "bytes per further token") == [16 * 2 * 64 * 2, 4 * packed]
    held = (4 * 204 + 12 * (4 + 16 + 1)) * 16 * packed / 2**20
    assert re.search(rf"memory while it generates +12.8 MiB +{held:.1f} MiB", out)
    assert "tokens are quantized as they are written" in out
    before, after = figures(out, "requests at once in")[-2:]
    assert before == 10
    assert after > 2 * figures(exact, "requests at once in")[-1]


def test_explain_counts_heads_that_evict_beside_heads_that_stream(run):
    words = ("--model", "testbed", "--prompt-tokens", "3000")
    code, out, err = run("explain", "duo-snapkv:plan=random,retrieval_ratio=0.25", *words)

    assert (code, err) == (0, "")
    # 750 of 3000 tokens: whole blocks of 16 beside a tail of 8, then 256 generated ones.
    kept = (750 - 8) // 16 + 3256 // 16 + 1 - 3000 // 16
    held = (4 * kept + 12 * (4 + 16 + 1)) * 16 * 2 * 64 * 2 / 2**20
    assert re.search(rf"memory while it generates +12.8 MiB +{held:.1f} MiB", out)
    assert "in which heads" in out
    assert "Retrieval heads hold the whole prompt until it ends" in out
    assert "4 of 16 KV heads keep the prompt until it ends, then their budget of it, the" in out
    assert "every token" not in out

    short = (*words[:-1], "250", "--output-tokens", "20")
    within = run("explain", "duo-snapkv:plan=random,retrieval_ratio=0.25", *short)[1]
    assert "Retrieval heads hold" not in within
    assert "Nothing of such a request is evicted" in within
    code, _, err = run("explain", "duo-snapkv:plan=random,retrieval_ratio=0", *words)
    assert code == 2
    assert "nothing would be evicted" in err


def test_explain_counts_packed_stores_of_retrieval_heads(run, tmp_path):
    file = tmp_path / "labels.yaml"
    # Lanes of one head and of two; int8 cells of 2,176 bytes for 16 tokens of a head.
    labels = "heads: {plan: inline, labels: ['0001', '1100', '0000', '0001']}"
    file.write_text(f"base: snapkv\nquantize: {{keys: int8, values: int8}}\n{labels}\n")
    words = ("--model", "testbed", "--prompt-tokens", "3000", "--block-size", "32")

    code, out, err = run("explain", str(file), *words)

    assert (code, err) == (0, "")
    # A page of one head, 8,192 bytes, holds 3 cells; one of two heads 7, for 3.5 of each.
    assert figures(out, "bytes per further token") == [4096, 4 * 8192 // (3 * 16)]
    # 1,024 of the prompt with its open block of 24 tokens; at 3,256 tokens 24 are open.
    cells = (1024 - 24 + 256) // 16 + 1
    blocks = -(-cells // 3) + 1 + 3 * (1 + 2 + 1)
    held = blocks * 4 * 8192 / 2**20
    assert re.search(rf"memory while it generates +12.8 MiB +{held:.1f} MiB", out)
    assert "the newest 0 to 31 tokens; all that streaming heads keep" in out
    assert "A store's block holds 48 tokens of its heads, an exact one 32" in out
    assert "quantized once" in out


def test_explain_counts_a_head_plan_on_each_rank(run, tmp_path):
    """Rank 1 has all retrieval heads: rank 0 promotes as many."""
    file = tmp_path / "labels.yaml"
    file.write_text("heads: {plan: inline, labels: ['0011', '0011', '0000', '0000']}\n")
    words = ("explain", str(file), "--model", "testbed", "--prompt-tokens", "3000")

    code, out, _ = run(*words, "--", "-tp", "2")
    wrong, _, err = run(*words, "--", "--tensor-parallel-size", "3")

    assert code == 0
    assert "on each of 2 ranks" in out
    assert "4 more keep every token, so that ranks" in out
    assert "as layer.head of the first rank: 0.0, 0.1, 1.0, 1.1" in out
    # All heads of the rank would hold 8 of 16; 4 of its 8 keep every token.
    assert figures(out, "bytes per further token") == [8 * 256, 4 * 256]
    assert (wrong, err.count("\n")) == (2, 1)
    assert "--tensor-parallel-size does not divide the model's heads; got 3" in err


def test_explain_of_a_prompt_within_the_window_of_all_heads(run):
    words = ("explain", "streaming_llm:prefill=windowed", "--model", "testbed")

    assert "Nothing of such a request is evicted" in run(*words, "--prompt-tokens", "700")[1]
    assert "longer prompts fit, too" in run(*words, "--prompt-tokens", "1400")[1]


def test_a_size_that_is_given_twice_is_one_line(run):
    words = ("explain", "snapkv", "--model", "testbed", "--block-size", "32", "--")

    code, _, err = run(*words, "--block-size", "16")

    assert (code, err.count("\n")) == (2, 1)
    assert "--block-size is given twice; got 32, and 16 after --" in err
    assert run(*words, "--block-size", "32")[0] == 0


def test_explain_names_the_heads_that_are_promoted(run):
    out = run("explain", "duo:plan=random,retrieval_ratio=0.45", "--model", "testbed")[1]

    assert "7 of 16 KV heads keep every token" in out
    assert re.search(r"1 more keep every token, .* as layer.head: \d\.\d\n", out)


def test_explain_refuses_a_head_plan_beside_sliding_window_layers(run, model):
    folder = model(layer_types=["sliding_attention", "full_attention"] * 16, sliding_window=1024)

    code, _, err = run("explain", "duo:plan=random", "--model", folder)

    assert code == 2
    assert "needs a model whose layers all have full attention; got 16 layers" in err


def test_explain_of_a_prompt_within_the_budget(run):
    out = run("explain", "snapkv", "--model", "testbed", "--prompt-tokens", "1000")[1]

    before, after = figures(out, "blocks while it generates")
    assert after == before
    assert "within the budget: nothing of it is evicted" in out


def test_explain_says_when_and_where(run):
    stream = run("explain", "streaming_llm", "--model", "testbed")[1]
    decode = run("explain", "knorm:every_decode_tokens=64", "--model", "testbed")[1]

    assert "from the prompt's end on, block by block" in stream
    assert "once at the prompt's end and every 64 generated tokens" in decode
    assert "0.25 of the prompt, at least 83 tokens" in decode


def test_explain_leaves_sliding_window_layers_to_vllm(run, model):
    kinds = ["sliding_attention", "full_attention"] * 16

    out = run("explain", "snapkv", "--model", model(layer_types=kinds, sliding_window=4096))[1]

    assert "16 full-attention layers" in out
    assert "16 sliding-window layers are left to vLLM" in out.splitlines()[0]
    assert figures(out, "bytes per token held")[0] == 131072 / 2


def test_sliding_window_that_is_switched_off_does_not_count(run, model):
    folder = model(sliding_window=4096, use_sliding_window=False)

    assert "32 full-attention layers, 8" in run("explain", "snapkv", "--model", folder)[1]


def test_explain_reads_sizes_from_vllm_options(run, model):
    out = run(
        "explain", "snapkv", "--model", model(), "--", "--block-size=32", "--max-model-len", "16K"
    )[1]

    assert "One request of 8192 prompt and 256 generated tokens, block size 32" in out


def test_explain_reports_conflicting_options(run, model):
    code, out, err = run(
        "explain", "snapkv", "--model", model(), "--",
        "--enable-prefix-caching", "--speculative-config", '{"method": "ngram"}', "-pp", "2",
        "-tp=4", "--attention-config.use_non_causal", "true",
    )  # fmt: skip

    assert code == 2
    assert err.count("\n") == 1
    assert "--speculative-config, --pipeline-parallel-size, --attention-config" in err
    assert "Drop --speculative-config" in out
    assert "blocks while it generates" in out
    assert "tensor-parallel-size" not in err


def test_explain_without_conflicts(run):
    code, out, _ = run("explain", "snapkv", "--model", "testbed", "--", "--enable-lora")

    assert code == 0
    assert "none with the given options" in out


MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536}
WRONG_MODEL = [
    (MLA, ["multi-head latent attention", "latents"]),
    ({"is_encoder_decoder": True}, ["encoder-decoder"]),
    ({"sliding_window": 4096}, ["all have a sliding window"]),
    ({"layer_types": ["sliding_attention"] * 32}, ["all have a sliding window"]),
    ({"layer_types": ["linear_attention"] * 31 + ["full_attention"]}, ["hybrid", "Mamba"]),
    ({"text_config": {}}, ["multimodal"]),
    ({"alibi": True}, ["ALiBi"]),
    ({"num_hidden_layers": None}, ["num_hidden_layers", "got None", "above 0"]),
    ({"num_attention_heads": "32"}, ["num_attention_heads", "got '32'"]),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_MODEL, ids=lambda value: str(value)[:40])
def test_unusable_model_is_one_line(run, model, changes, words):
    code, out, err = run("explain", "snapkv", "--model", model(**changes))

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in words if word not in err] == []


WRONG_WORDS = [
    ([], ["command", "--help"]),
    (["polices"], ["polices", "policies"]),
    (["explain", "snapkv"], ["--model"]),
    (["explain", "snapvk", "--model", "testbed"], ["Did you mean 'snapkv'?"]),
    (
        ["explain", "snapkv:keep_ratio=nan", "--model", "testbed"],
        ["'nan'; allowed", "at most 1.\n"],
    ),
    (["explain", "snapkv:pool=4", "--model", "testbed"], ["evict.scorer.pool", "odd"]),
    (["explain", "snapkv", "--model", "no/such"], ["'no/such' is not on this machine", "testbed"]),
    (["explain", "snapkv", "--model", "/no such/../x"], ["is not on this machine"]),
    (["explain", "snapkv", "--model", "testbed", "--block-size", "0"], ["--block-size", "'0'"]),
    (["explain", "snapkv", "--model", "testbed", "--block-size", "1e3"], ["--block-size"]),
    (
        ["explain", "snapkv", "--model", "testbed", "--prompt-tokens", "8192"],
        ["--prompt-tokens leaves no room", "less than 8192"],
    ),
    (
        ["explain", "snapkv:tokens=70", "--model", "testbed"],
        ["evict.budget.tokens", "70 tokens at a block size of 16", "at least 83"],
    ),
    (["explain", "snapkv", "--model", "testbed", "--", "--block-size", "x"], ["--block-size"]),
    (["check", "missing.yaml"], ["'missing.yaml' cannot be read"]),
    (["check", "snapkw"], ["'snapkw' is not known", "Did you mean 'snapkv'?"]),
    (
        ["explain", "snapkv", "--model", "testbed", "--", "--kv-policy", "knorm"],
        ["named twice", "Drop --kv-policy"],
    ),
    (["check", "configs/duo.yaml"], ["heads.file is missing", "calibrate-heads"]),
    (
        ["explain", "razor", "--model", "testbed"],
        ["heads.file is missing", "--method razor", "POLICY:file=FILE.tsv"],
    ),
]


@pytest.mark.parametrize(("words", "expected"), WRONG_WORDS, ids=lambda value: " ".join(value)[:60])
def test_bad_command_is_one_line(run, words, expected):
    code, out, err = run(*words)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [word for word in expected if word not in err] == []


def test_broken_config_json(run, tmp_path):
    (tmp_path / "config.json").write_text("[" * 100000)

    code, _, err = run("explain", "snapkv", "--model", str(tmp_path))

    assert code == 2
    assert "no usable config.json" in err


@pytest.mark.parametrize("policy", ["int8", "kivi2", "snapkv-demote"])
def test_explain_refuses_packed_codecs_over_an_fp8_cache_as_the_engine_does(run, policy):
    code, _, err = run("explain", policy, "--model", "testbed", "--", "--kv-cache-dtype", "fp8")

    assert code == 2
    assert "contradict each other" in err
    assert "allowed: auto" in err


def test_explain_refuses_packed_blocks_beside_sliding_window_layers(run, model):
    folder = model(layer_types=["sliding_attention", "full_attention"] * 16, sliding_window=1024)

    code, out, err = run("explain", "int8", "--model", folder)

    assert (code, out) == (2, "")
    assert "16 layers with a sliding window" in err


def test_explain_refuses_queries_that_fill_more_than_a_block(run, model, tmp_path):
    folder = model(num_attention_heads=64, num_key_value_heads=1)
    heads = tmp_path / "heads.tsv"
    heads.write_text("\n".join(["0.5"] * 16 + ["0.1"] * 16) + "\n")

    for policy in ("snapkv", f"duo-snapkv-int4:file={heads}"):
        code, _, err = run("explain", policy, "--model", folder)

        assert code == 2
        assert "one token's queries do not fit in a block; got --block-size 16" in err
    assert run("explain", "snapkv", "--model", folder, "--block-size", "32")[0] == 0


def test_explain_says_where_quantizing_saves_nothing(run, tmp_path):
    file = tmp_path / "labels.yaml"
    labels = "heads: {plan: inline, labels: ['0001', '1000', '0100', '0001']}"
    file.write_text(f"base: snapkv\nquantize: {{keys: int8, values: int8}}\n{labels}\n")
    words = ("explain", str(file), "--model", "testbed", "--block-size")

    # A page of one head, 16 tokens of 256 bytes, holds one cell of 16 tokens.
    assert (
        "holds 16 tokens of its heads, an exact one 16: quantizing saves nothing"
        in (run(*words, "16")[1])
    )
    assert "saves nothing" not in run(*words, "32")[1]


def test_explain_says_where_ranks_leave_no_head_to_stream(run, tmp_path):
    file = tmp_path / "labels.yaml"
    file.write_text("heads: {plan: inline, labels: ['1000', '0100', '0010', '0001']}\n")
    words = ("explain", str(file), "--model", "testbed", "--", "-tp")

    assert "No head streams: every rank" in run(*words, "4")[1]
    assert "No head streams" not in run(*words, "2")[1]


def test_explain_tells_the_side_that_stays_exact(run):
    text = ": tokens are quantized as they are written"

    for policy, exact in (("int4", "nothing"), ("int4:keys=none,rotate=none", "keys")):
        assert f"{exact}{text}" in run("explain", policy, "--model", "testbed")[1]
