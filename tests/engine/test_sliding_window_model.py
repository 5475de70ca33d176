"""A model with full-attention and sliding-window layers: the policy acts on the former alone."""

import pytest
import torch
from reference.tiny_model import random_prompt, write_tokenizer

from engine.cases import CASES

LENGTHS = (37, 150, 300, 411)
FULL_LAYERS = {2, 5}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A random Gemma 3 text model; four of its six layers have a window of 64 tokens."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    path = tmp_path_factory.mktemp("gemma") / "model"
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        sliding_window=64,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Gemma3ForCausalLM(config).float().save_pretrained(path)
    write_tokenizer(path, 512)
    return path


def run(engine):
    return engine.run([random_prompt(length, seed=length) for length in LENGTHS], 40)


def test_only_full_attention_layers_are_under_the_policy(gemma, engine_of):
    pool = {"num_gpu_blocks_override": 150}
    stock = run(engine_of(None, gemma, **pool))
    roomy = {**CASES["knorm"].policy, "evict": {"scorer": {"name": "knorm"}}}
    roomy["evict"]["budget"] = {"tokens": 500}

    untouched = run(engine_of(roomy, gemma, **pool))
    engine = engine_of(CASES["snapkv"].policy, gemma, **pool)
    evicted = run(engine)

    layers = {int(name.split(".")[2]) for name in engine.runtime.layer_names}
    assert layers == FULL_LAYERS
    # Within the budget nothing changes, bit for bit; beyond it, staging shrinks and answers change.
    assert [t.logprobs for t in untouched] == [t.logprobs for t in stock]
    assert evicted[0].logprobs == stock[0].logprobs
    for before, after in zip(stock[1:], evicted[1:], strict=True):
        assert after.logprobs != before.logprobs
        assert len(after.held[-1]["StagingSpec"]) < len(before.held[-1]["FullAttentionSpec"])
    windows = [name for name in engine.lanes if name.startswith("SlidingWindowSpec")]
    assert len(windows) == 2
