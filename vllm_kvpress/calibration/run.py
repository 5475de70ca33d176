"""One calibration from model to pattern file: loads, looks or trains, writes."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vllm_kvpress import __version__
from vllm_kvpress.calibration.documents import SHORTEST, draw_sample
from vllm_kvpress.calibration.duo import DuoSettings, train_gates
from vllm_kvpress.calibration.heatmap import draw_heatmap
from vllm_kvpress.calibration.models import Loaded, load_model
from vllm_kvpress.calibration.razor import REPEATS, combined_scores, observe_repeats
from vllm_kvpress.errors import ConfigError
from vllm_kvpress.policies.heads import write_pattern

__all__ = ["METHODS", "calibrate"]

# Scores of all KV heads, and what the record says beside the common part.
Found = tuple[list[list[float]], dict[str, Any]]

_MOST_PERIOD = 2500
_ANSWER_TOKENS = 256
_REPORTS = 10


def calibrate(
    method: str,
    model: str,
    out: Path,
    options: Mapping[str, Any],
    console: Console,
    *,
    plot: bool = True,
) -> list[list[float]]:
    """Writes the pattern file `out`, its record and its picture; returns the scores.

    Args:
        method: one of `METHODS`.
        model: `testbed`, a folder, or a name on the Hugging Face hub.
        out: ends in .tsv; .json and .png are written beside it.
        options: what the user gave beyond the defaults, by the names in `METHODS`.
        console: progress and results go there.
        plot: whether the picture is drawn.

    Raises:
        KVPressError: an option does not go with the method, or the model is not usable.
    """
    find, known = METHODS[method]
    foreign = sorted(set(options) - known)
    if foreign:
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} does not go with --method {method}",
            allowed=", ".join(f"--{name.replace('_', '-')}" for name in sorted(known)),
        )
    started = time.monotonic()
    loaded = load_model(model)
    scores, extra = find(loaded, {"model": model, **options}, out, console)
    record = {
        "method": method,
        "model": model,
        "shape": asdict(loaded.shape),
        **extra,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
    }
    write_pattern(out, scores, record)
    if plot:
        title = f"{method} on {Path(model).name}"
        draw_heatmap(scores, title, out.with_suffix(".png"))
    return scores


def _razor(loaded: Loaded, options: dict[str, Any], out: Path, console: Console) -> Found:
    shape = loaded.shape
    assert shape.num_heads is not None
    limit = (loaded.max_tokens - 1) // REPEATS
    period = options.get("tokens") or min(_MOST_PERIOD, limit, _num_words(loaded))
    if not 2 <= period <= limit:
        raise ConfigError(
            "--tokens does not fit into the model's context four times",
            got=str(period),
            allowed=f"2 to {limit}",
        )
    seed = options.get("seed", 0)
    by_query_head = observe_repeats(
        loaded.model, shape.num_layers, shape.num_heads, period=period, seed=seed
    )
    return combined_scores(by_query_head.by_kv_head(shape.num_kv_heads)), {
        "settings": {"tokens": period, "repeats": REPEATS, "seed": seed},
        "induction": _rounded(by_query_head.induction),
        "echo": _rounded(by_query_head.echo),
    }


def _duo(loaded: Loaded, options: dict[str, Any], out: Path, console: Console) -> Found:
    settings = DuoSettings(**options)
    limit = loaded.max_tokens - _ANSWER_TOKENS
    if not SHORTEST <= settings.length <= limit:
        raise ConfigError(
            "--length is not usable",
            got=str(settings.length),
            allowed=f"{SHORTEST} to {limit} tokens (the answer needs up to {_ANSWER_TOKENS} more)",
        )
    shortest = max(SHORTEST, settings.length // 4)
    seen = settings.sink_tokens + settings.recent_tokens
    if seen >= shortest or settings.recent_tokens == 0:
        raise ConfigError(
            "--sink-tokens and --recent-tokens are not usable",
            got=f"{settings.sink_tokens} and {settings.recent_tokens}",
            allowed=f"one recent token or more, together less than {shortest} (shortest document)",
            fix="Lower them, or raise --length",
        )
    shape = (loaded.shape.num_layers, loaded.shape.num_kv_heads)
    with _progress(console, settings.steps) as report:
        gates = train_gates(
            loaded.model,
            lambda step: draw_sample(
                loaded.tokenizer, length=settings.length, seed=settings.seed, step=step
            ),
            shape,
            settings,
            out.with_suffix(".checkpoint"),
            report,
        )
    # The authors' own names for the two windows stand in their config.json.
    return gates.tolist(), {
        "settings": asdict(settings),
        "sink_size": settings.sink_tokens,
        "recent_size": settings.recent_tokens,
    }


METHODS: dict[str, tuple[Callable[[Loaded, dict[str, Any], Path, Console], Found], set[str]]] = {
    "duo": (_duo, {field.name for field in fields(DuoSettings)} - {"model"}),
    "razor": (_razor, {"tokens", "seed"}),
}


class _progress:  # noqa: N801 - used like a function
    """Shows a bar; where there is no terminal, ten lines."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("gates", total=steps)

    def __enter__(self) -> Callable[[int, float, Tensor], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, step: int, loss: float, gates: Tensor) -> None:
        text = f"step {step}, {int((gates >= 0.5).sum())} of {gates.numel()} gates at 0.5 or more"
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and step % max(1, self._steps // _REPORTS) == 0:
            self._console.print(f"{text}, distillation loss {loss:.3g}", highlight=False)


def _num_words(loaded: Loaded) -> int:
    """Tokens that can be drawn without repetition: all but the special ones."""
    return max(2, int(loaded.model.config.vocab_size) - 3)


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(score, 4) for score in row] for row in scores.tolist()]


def _versions() -> dict[str, str]:
    found = {"vllm_kvpress": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers")}
