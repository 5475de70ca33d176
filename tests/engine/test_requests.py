"""What a single request may ask for: samples, prompt log-probabilities, an adapter, a form."""

import json

import pytest
import torch
from reference.dense import DenseLlama, DenseReference, Rule, default_chunks
from reference.tiny_model import random_prompt
from safetensors.torch import save_file

from engine.cases import CASES
from engine.compare import FELT, TOLERANCE, compare
from engine.harness import TOP, Engine, Trace

RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def engine(tiny):
    engine = Engine(tiny, CASES["snapkv"].policy)
    yield engine
    engine.close()


def generate(engine, prompt, lora=None, **given):
    from vllm import SamplingParams

    params = SamplingParams(**{"logprobs": TOP, "ignore_eos": True, "detokenize": False, **given})
    inputs = [{"prompt_token_ids": prompt}]
    (result,) = engine.llm.generate(inputs, params, use_tqdm=False, lora_request=lora)
    engine.check_empty()
    return result


def trace_of(prompt, completion):
    rows = [{token: e.logprob for token, e in row.items()} for row in completion.logprobs]
    outputs = list(completion.token_ids)
    chunks = default_chunks(len(prompt), len(prompt) + len(outputs) - 1)
    return Trace(prompt, outputs, rows, chunks)


def check(trace, dense, rule):
    assert compare(trace, dense, rule, own=True).agrees()
    assert compare(trace, dense, Rule(rule.block_size), own=True).error > FELT


def test_several_samples_of_one_prompt(engine, dense):
    prompt = random_prompt(200, seed=20)

    result = generate(engine, prompt, n=3, temperature=1.0, seed=7, max_tokens=30)

    assert len({tuple(completion.token_ids) for completion in result.outputs}) == 3
    for completion in result.outputs:
        check(trace_of(prompt, completion), dense, CASES["snapkv"].rule)


def test_prompt_log_probabilities_are_those_of_full_attention(engine, dense):
    prompt = random_prompt(200, seed=21)

    result = generate(engine, prompt, temperature=0.0, prompt_logprobs=3, max_tokens=30)

    reference = DenseReference(dense, Rule(32))
    expected = reference.logprobs(prompt[:1], prompt[1:], [(0, len(prompt) - 1)]).logprobs
    for row, wanted in zip(result.prompt_logprobs[1:], expected, strict=True):
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(float(wanted[token]), abs=1e-4)
    check(trace_of(prompt, result.outputs[0]), dense, CASES["snapkv"].rule)


@pytest.mark.full
@pytest.mark.parametrize("name", ["snapkv", "knorm", "streaming_llm"])
def test_an_adapter(name, engine_of, tiny, tmp_path):
    from vllm.lora.request import LoRARequest

    case = CASES[name]
    adapted = write_adapter(tmp_path, DenseLlama(tiny))
    engine = engine_of(case.policy, enable_lora=True, max_lora_rank=8)
    prompt = random_prompt(200, seed=22)

    plain = generate(engine, prompt, temperature=0.0, max_tokens=40)
    lora = LoRARequest("adapter", 1, str(tmp_path))
    result = generate(engine, prompt, lora, temperature=0.0, max_tokens=40)

    check(trace_of(prompt, plain.outputs[0]), DenseLlama(tiny), case.rule)
    check(trace_of(prompt, result.outputs[0]), adapted, case.rule)
    assert compare(trace_of(prompt, plain.outputs[0]), adapted, case.rule, own=True).error > FELT


def write_adapter(path, model):
    """Writes a random adapter of queries and values; returns `model` with it merged in."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(model.num_layers):
        for part in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{part}"
            weight = model._weights[f"{name}.weight"]
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], RANK, generator=generator) / RANK**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up * 0.3
            model._weights[f"{name}.weight"] = weight + up * 0.3 @ down * (ALPHA / RANK)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.full
def test_structured_output(engine_of, tiny):
    from vllm.sampling_params import StructuredOutputsParams

    case = CASES["snapkv"]
    engine = engine_of(case.policy, skip_tokenizer_init=False)
    prompt = random_prompt(200, seed=23)
    form = StructuredOutputsParams(regex="(w1[0-9]){12}")  # the tokenizer has a word for each token

    result = generate(engine, prompt, temperature=0.0, max_tokens=12, structured_outputs=form)

    trace = trace_of(prompt, result.outputs[0])
    assert len(trace.outputs) == 12
    assert all(10 <= token < 20 for token in trace.outputs)
    assert structured_error(trace, DenseLlama(tiny), case.rule) <= TOLERANCE
    assert structured_error(trace, DenseLlama(tiny), Rule(case.rule.block_size)) > FELT


def structured_error(trace, model, rule):
    """The largest error of log-probabilities among the ten tokens that the form allows."""
    expected = DenseReference(model, rule).logprobs(trace.prompt, trace.outputs).logprobs
    expected = expected[:, 10:20].log_softmax(-1)
    return max(
        abs(logprob - float(expected[index, token - 10]))
        for index, row in enumerate(trace.logprobs)
        for token, logprob in row.items()
    )
