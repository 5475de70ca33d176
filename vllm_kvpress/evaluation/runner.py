"""One engine, all its cells: run as `python -m vllm_kvpress.evaluation.runner JOB.json`.

Writes one JSON object a line to stdout: `{"event": "ready" | "answered" | "cell", ...}`. What vLLM
prints goes to stderr. The engine lives in this very process, so that its scheduler and its pool of
blocks are in view.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_kvpress.evaluation.divergence import MOST_TOKENS, Distributions, compare
from vllm_kvpress.evaluation.estimates import estimate_mean, wilson_interval
from vllm_kvpress.evaluation.items import (
    LATE,
    SURVEY,
    Item,
    answer_tokens,
    is_right,
    make_items,
    num_prompts,
)
from vllm_kvpress.evaluation.observe import observe
from vllm_kvpress.testbed import MODEL_NAME, resolve_model

__all__ = ["main"]

_OWN_OPTIONS = ("model", "kv_policy")
# Where no --block-size is given: what a policy takes by default, for the full cache as well.
_BLOCK_SIZE = {True: 32, False: 16}


class Engine:
    """A vLLM engine in this process, made for one job."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        options = {
            "max_model_len": job["max_model_len"],
            "block_size": _BLOCK_SIZE[on_cpu],
            "disable_log_stats": True,
            # Compiling for a CPU takes minutes, and changes nothing that is counted here.
            **({"enforce_eager": True} if on_cpu else {}),
            **parse_options(job["vllm_options"]),
        }
        if job["divergence"]:
            options["max_logprobs"] = MOST_TOKENS
        if job["divergence"] or any(cell["task"].startswith(LATE) for cell in job["cells"]):
            options["logits_processors"] = ["vllm_kvpress.evaluation.forced:ForcedOutputs"]
        self.is_full = job["policy"] is None
        if not self.is_full:
            options["kv_policy"] = job["policy"]
        self.llm = LLM(resolve_model(job["model"]), **options)
        client: Any = self.llm.llm_engine.engine_core
        self.scheduler: Any = client.engine_core.scheduler
        self.pool_blocks: int = self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
        self.device = current_platform.get_device_name() if not on_cpu else "cpu"

    def describe(self) -> dict[str, Any]:
        """Return the part of a record that is the same for all cells of the engine."""
        config = self.llm.llm_engine.vllm_config
        return {
            "device": self.device,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": config.cache_config.block_size,
            "block_bytes": self.block_bytes,
            "max_model_len": config.model_config.max_model_len,
            "eager": bool(config.model_config.enforce_eager),
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers of one rank; all cache groups share them."""
        config = self.scheduler.kv_cache_config
        (pool_bytes,) = {tensor.size for tensor in config.kv_cache_tensors}
        return int(pool_bytes // config.num_blocks)

    def answer(self, items: Sequence[Item], num_tokens: int, tell: Any) -> Any:
        """Generate greedily for all prompts at once; return the outputs and what was seen."""
        engine = self.llm.llm_engine
        seen = observe(self.scheduler)
        requests = _requests(items)
        for index, (prompt, late) in enumerate(requests):
            params = _params(num_tokens, late)
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        outputs: dict[int, Any] = {}
        while engine.has_unfinished_requests():
            done = [output for output in seen.time_step(engine.step) if output.finished]
            outputs |= {int(output.request_id): output.outputs[0] for output in done}
            if done:
                tell(event="answered", tokens=sum(len(o.prompt_token_ids) for o in done))
        return [outputs[index] for index in range(len(requests))], seen

    def distributions(
        self, items: Sequence[Item], answers: Sequence[Sequence[int]]
    ) -> Distributions:
        """Return the next-token distributions along given answers, one for each prompt."""
        vocabulary = self.llm.llm_engine.vllm_config.model_config.get_vocab_size()
        questions = _requests(items)
        forced = [[*late, *answer] for (_, late), answer in zip(questions, answers, strict=True)]
        params = [
            _params(0, given, logprobs=min(vocabulary, MOST_TOKENS), flat_logprobs=True)
            for given in forced
        ]
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt, _ in questions]
        results = self.llm.generate(prompts, params, use_tqdm=False)
        outputs = [result.outputs[0] for result in results]
        for output, given in zip(outputs, forced, strict=True):
            assert list(output.token_ids) == given, "the engine did not take the given outputs"
        return Distributions.of_outputs(answers, outputs)

    def text(self, output: Any, late: Sequence[int]) -> str:
        """Return what the model said by itself."""
        tokens = list(output.token_ids)
        if not late:
            return str(output.text)
        assert tokens[: len(late)] == list(late), "the engine did not take the given outputs"
        return str(self.llm.get_tokenizer().decode(tokens[len(late) :], skip_special_tokens=True))


def _requests(items: Sequence[Item]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the prompt of each question, and the tokens that are given after it."""
    return [(prompt, item.late) for item in items for prompt in item.prompts]


def _params(num_tokens: int, given: Sequence[int], **options: Any) -> Any:
    """Return those of a greedy request: tokens that are given, then at most so many of its own."""
    from vllm import SamplingParams

    from vllm_kvpress.evaluation.forced import EXTRA_ARG

    extra = {"extra_args": {EXTRA_ARG: list(given)}} if given else {}
    return SamplingParams(temperature=0.0, max_tokens=len(given) + num_tokens, **extra, **options)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return vLLM's options, as typed on its command line, as arguments of `LLM`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_parser: Any = FlexibleArgumentParser
    parser = EngineArgs.add_cli_args(make_parser(prog="options after --"))
    given, default = (
        vars(EngineArgs.from_cli_args(parser.parse_args(list(line)))) for line in (words, ())
    )
    return {
        name: value
        for name, value in given.items()
        if name not in _OWN_OPTIONS and value != default[name]
    }


def run_cell(
    engine: Engine, items: Sequence[Item], job: dict[str, Any], cell: Any, tell: Any
) -> Any:
    """Return the measured part of one cell's record."""
    model = job["model"]
    prompts = [prompt for item in items for prompt in item.prompts]
    questions = [(item, question) for item in items for question in item.document.questions]
    outputs, seen = engine.answer(items, answer_tokens(cell["task"], model), tell)
    right = [
        is_right(question, engine.text(output, item.late), model)
        for (item, question), output in zip(questions, outputs, strict=True)
    ]
    turns = num_prompts(cell["task"])
    scores = [sum(right[i : i + turns]) / turns for i in range(0, len(right), turns)]
    mean = estimate_mean(scores)
    num_prompt = sum(map(len, prompts)) / len(prompts)
    num_generated = sum(len(output.token_ids) for output in outputs) / len(outputs)
    figures = seen.figures(engine.pool_blocks)
    held_bytes = figures["blocks"]["steady"] * engine.block_bytes
    record = {
        "accuracy": round(mean.mean, 5),
        "standard_error": round(mean.standard_error, 5),
        "n": mean.n,
        "scores": [int(score) if score in (0, 1) else round(score, 5) for score in scores],
        "depths": None if items[0].depth is None else [item.depth for item in items],
        "match": "exact" if model == MODEL_NAME else "contains",
        "tokens": {"prompt": round(num_prompt, 2), "generated": round(num_generated, 2)},
        **figures,
        "bytes_per_token": round(held_bytes / (num_prompt + num_generated), 2),
    }
    if turns == 1:
        bounds = wilson_interval(sum(scores), len(scores))
        record["interval_95"] = [round(bound, 5) for bound in bounds]
    elif cell["task"] != SURVEY:
        record["by_turn"] = [round(sum(right[t::turns]) / len(items), 5) for t in range(turns)]
    if job["divergence"]:
        record["divergence"] = _divergence(engine, items, outputs, Path(cell["reference"]))
    return record


def _divergence(
    engine: Engine, items: Sequence[Item], outputs: Sequence[Any], path: Path
) -> dict[str, Any] | None:
    """Return how far the engine is from the full cache, which leaves its own distributions."""
    if engine.is_full:
        pairs = zip(outputs, _requests(items), strict=True)
        answers = [list(output.token_ids)[len(late) :] for output, (_, late) in pairs]
        engine.distributions(items, answers).save(path)
        return None
    full = Distributions.load(path)
    return compare(full, engine.distributions(items, full.answers))


def main() -> int:
    """Run the job that the command line names; return the exit code."""
    events = _take_stdout()

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = Engine(job)
    tokenizer = engine.llm.get_tokenizer()
    shared = engine.describe()
    tell(event="ready")
    for cell in job["cells"]:
        items = make_items(
            cell["task"],
            cell["length"],
            limit=job["limit"],
            seed=job["seed"],
            tokenizer=tokenizer,
            model=job["model"],
        )
        record = run_cell(engine, items, job, cell, tell)
        tell(
            event="cell",
            task=cell["task"],
            length=cell["length"],
            record={**record, "engine": shared},
        )
    engine.llm.llm_engine.engine_core.shutdown()
    return 0


def _take_stdout() -> TextIO:
    """Return the process's stdout for events alone; everything else printed goes to stderr."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


if __name__ == "__main__":
    sys.exit(main())
