"""Engines for the benches: in this process, so that scheduler, pool and worker are in view."""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from vllm_kvpress.head_figures import HeadFigures
from vllm_kvpress.plan import RetentionPlan
from vllm_kvpress.testbed import MODEL_NAME, resolve_model
from vllm_kvpress.testbed.documents import Document, Question, Task, is_correct, make_document

FULL = "none"
POLICIES = ("streaming_llm", "random", "knorm", "keydiff", "value_key_norm", "snapkv")
# The question and the template's end stay, whatever a scorer thinks of them.
RECENT_TOKENS = 64
# What the bundled model needs of a scorer: in its facts the value's digits lie up to 6 tokens
# behind the words that the question attends to, so SnapKV's usual pooling over 5 loses digits.
SCORERS: dict[str, dict[str, Any]] = {"snapkv": {"name": "snapkv", "window": 64, "pool": 13}}


def policy_source(name: str, keep_ratio: float) -> dict[str, Any] | None:
    """Return what `LLM(kv_policy=...)` takes for a policy's name; None for stock vLLM."""
    if name == FULL:
        return None
    evict: dict[str, Any] = {"budget": {"keep_ratio": keep_ratio}}
    if name in SCORERS:
        evict["scorer"] = SCORERS[name]
    return {"base": name, "recent_tokens": RECENT_TOKENS, "evict": evict}


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model is run and how."""
    group = parser.add_argument_group("engine")
    model_help = "a model's folder or name; 'testbed' is the bundled one"
    group.add_argument("--model", default=MODEL_NAME, help=model_help)
    group.add_argument("--load-format", default="auto", help="'dummy' for random weights")
    group.add_argument("--dtype", default="bfloat16")
    group.add_argument("--block-size", type=int, default=32)
    group.add_argument("--compile", action="store_true", help="compile, and capture CUDA graphs")
    memory_help = "share of the device's memory that vLLM may use"
    group.add_argument("--memory-utilization", type=float, default=0.2, help=memory_help)
    threads_help = "threads of an engine on a CPU, bound to no core; 0: one a core, bound"
    group.add_argument("--cpu-threads", type=int, default=1, help=threads_help)


def prepare_environment(arguments: argparse.Namespace) -> None:
    """Set what vLLM reads from the environment; children inherit it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.pop("VLLM_KV_POLICY", None)
    if arguments.cpu_threads:
        # Threads wait for each other many times a step: beside other work, one is the quickest.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(arguments.cpu_threads)


def engine_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the engine's part of a record's settings."""
    name = resolve_model(arguments.model).rstrip("/").rpartition("/")[2]
    return {
        "model": MODEL_NAME if arguments.model == MODEL_NAME else name,
        "load_format": arguments.load_format,
        "dtype": arguments.dtype,
        "block_size": arguments.block_size,
        "eager": not arguments.compile,
        "cpu_threads": arguments.cpu_threads,
        "recent_tokens": RECENT_TOKENS,
        "scorers": SCORERS,
    }


class Engine:
    """A vLLM engine in this process.

    Args:
        arguments: The command line's engine arguments.
        policy: What `LLM(kv_policy=...)` takes, or None for stock vLLM.
        options: Further options of `LLM`.
    """

    def __init__(
        self, arguments: argparse.Namespace, policy: dict[str, Any] | None, **options: Any
    ) -> None:
        from vllm import LLM

        if policy is not None:
            options["kv_policy"] = policy
        self.llm = LLM(
            resolve_model(arguments.model),
            load_format=arguments.load_format,
            dtype=arguments.dtype,
            block_size=arguments.block_size,
            enforce_eager=not arguments.compile,
            gpu_memory_utilization=arguments.memory_utilization,
            skip_tokenizer_init=arguments.model != MODEL_NAME,
            disable_log_stats=True,
            **options,
        )
        self.engine: Any = self.llm.llm_engine
        self.core: Any = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self._ids = itertools.count()
        assert (self.plan is None) == (policy is None), "the engine runs under another policy"

    @property
    def runner(self) -> Any:
        """The worker's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def plan(self) -> RetentionPlan | HeadFigures | None:
        """What a request holds under the policy; None for stock vLLM."""
        from vllm_kvpress.integration.head_attention import figures_of
        from vllm_kvpress.integration.lanes import plan_in

        config = self.runner.vllm_config
        return plan_in(self.runner.kv_cache_config.kv_cache_groups) or figures_of(config)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the cache tensors that the engine allocated, each counted once."""
        context = self.runner.vllm_config.compilation_config.static_forward_context
        storages = {
            layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache.untyped_storage().nbytes()
            for layer in context.values()
            if getattr(layer, "kv_cache", None) is not None and layer.kv_cache.numel()
        }
        return sum(storages.values())

    def add(self, prompt: Sequence[int], num_outputs: int) -> str:
        """Queue a request that generates exactly so many tokens; return its id."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=num_outputs, ignore_eos=True, detokenize=False
        )
        request_id = f"bench-{next(self._ids)}"
        self.engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)
        return request_id

    def drain(self) -> dict[str, list[int]]:
        """Run until nothing is left; return the tokens of the requests that finished."""
        outputs: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
        return outputs

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.engine_core.shutdown()
        del self.llm, self.engine, self.core, self.scheduler, self.pool
        gc.collect()


class Reader:
    """Turns documents into tokens and tokens into answers; random tokens for other models."""

    def __init__(self, model: str) -> None:
        self.knows_language = model == MODEL_NAME
        self._model = resolve_model(model)
        if self.knows_language:
            from transformers import AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(self._model)

    def prompts(
        self, task: Task, count: int, num_tokens: int, seed: int
    ) -> list[tuple[list[int], Question | None]]:
        """Return prompts of (almost) `num_tokens` tokens, each with its question."""
        if not self.knows_language:
            return [(random_prompt(num_tokens, seed + i), None) for i in range(count)]
        documents = [
            make_document(task, num_tokens=num_tokens, seed=seed + i) for i in range(count)
        ]
        return [(self.encode(document), document.questions[0]) for document in documents]

    def encode(self, document: Document) -> list[int]:
        """Return the tokens of a document with its question, as the chat template puts it."""
        return list(self._tokenizer.encode(document.prompt(document.questions[0])))

    def is_right(self, question: Question | None, tokens: Sequence[int]) -> bool | None:
        """Return whether the tokens up to the end of the text are the answer; None if unknown."""
        if question is None:
            return None
        return is_correct(question, self._tokenizer.decode(self.answer_tokens(tokens)))

    def answer_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens before the end of the text."""
        if not self.knows_language:
            return list(tokens)
        end = self._tokenizer.eos_token_id
        return list(itertools.takewhile(lambda token: token != end, tokens))


def random_prompt(num_tokens: int, seed: int, vocabulary: int = 512) -> list[int]:
    """Return token ids that every model of the benches knows, none of them special by custom."""
    rng = random.Random(seed)
    return [rng.randrange(8, vocabulary) for _ in range(num_tokens)]


@contextmanager
def fresh_process(num_tasks: int | None = 1) -> Iterator[ProcessPoolExecutor]:
    """Yield an executor of one process at a time, renewed after `num_tasks` calls."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=num_tasks) as executor:
        yield executor
