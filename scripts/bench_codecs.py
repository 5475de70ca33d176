"""Measure what each codec loses on real cache contents, beside vLLM's own formats at equal bytes.

The bundled model reads documents in float32; post-RoPE keys and values of every layer and KV head
go through each codec and back. For each: bytes of one token and head, the relative error

    ||x - x^|| / ||x||        of keys, of values, and of what the last queries' attention returns
                              over the restored cache, over restored keys, over restored values

pooled over documents and heads, and what equal steps s lose in theory, sqrt(sum s^2 / 12) / ||x||.
Tokens behind the last whole group of 32 stay exact with every codec. vLLM's formats are computed
from their formulas, not run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from codec_formats import (
    GROUP_TOKENS,
    OURS,
    ROTATED,
    SIGNS_SEED,
    Format,
    Side,
    our_formats,
    vllm_formats,
)
from records import RESULTS, Record, make_record, read_record, write_record
from rich.console import Console
from rich.table import Table

from vllm_kvpress.testbed import model_path
from vllm_kvpress.testbed.documents import TASKS, make_document

SIDES = ("keys", "values")
OUTPUTS = {"output": "both", "output_keys": "keys only", "output_values": "values only"}
TOY = {"tasks": ["needle"], "num_tokens": 256}


class Layer(NamedTuple):
    """What attention of one layer reads: [heads, tokens, head_size]; queries of the last tokens."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def read_caches(arguments: argparse.Namespace) -> Iterator[list[Layer]]:
    """Yield the layers of each document, read by the model in float32."""
    queries: list[torch.Tensor] = []
    attend = transformers.AttentionInterface()["sdpa"]

    def keep_queries(module: Any, query: torch.Tensor, *others: Any, **options: Any) -> Any:
        queries.append(query[0, :, -arguments.queries :])
        return attend(module, query, *others, **options)

    transformers.AttentionInterface.register("kept_queries", keep_queries)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, attn_implementation="kept_queries"
    ).eval()
    for task in arguments.tasks:
        document = make_document(task, num_tokens=arguments.num_tokens, seed=arguments.seed)
        tokens = torch.tensor([tokenizer.encode(document.prompt(document.questions[0]))])
        queries.clear()
        with torch.inference_mode():
            cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        yield [
            Layer(query, layer.keys[0], layer.values[0])
            for query, layer in zip(queries, cache.layers, strict=True)
        ]


def attend_last(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return causal attention of the last queries, [query_heads, window, head_size]."""
    window, num_tokens = queries.shape[1], keys.shape[1]
    grouped = queries.unflatten(0, (keys.shape[0], -1))
    logits = grouped @ keys.unsqueeze(1).mT / math.sqrt(keys.shape[2])
    seen = torch.ones(window, num_tokens, dtype=torch.bool).tril(num_tokens - window)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ values.unsqueeze(1)).flatten(0, 1)


def restore(side: Side, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return `x` after a round trip of its whole groups of tokens, and the theory's squared error.

    The theory is NaN for a format without equal steps.
    """
    whole = x.shape[1] // GROUP_TOKENS * GROUP_TOKENS
    restored, noise = side.restore(x[:, :whole].contiguous())
    return torch.cat([restored, x[:, whole:]], dim=1), math.nan if noise is None else float(
        noise.sum()
    )


def squared(x: torch.Tensor) -> float:
    """Return the sum of squares."""
    return float(x.double().square().sum())


def layer_sums(layer: Layer, form: Format) -> dict[str, tuple[float, float]]:
    """Return (squared error, squared size) of what one layer loses, by what is compared."""
    keys, key_noise = restore(form.keys, layer.keys)
    values, value_noise = restore(form.values, layer.values)
    exact = attend_last(*layer)
    size = {"keys": squared(layer.keys), "values": squared(layer.values)}
    outputs = {
        "output": attend_last(layer.queries, keys, values),
        "output_keys": attend_last(layer.queries, keys, layer.values),
        "output_values": attend_last(layer.queries, layer.keys, values),
    }
    return {
        "keys": (squared(keys - layer.keys), size["keys"]),
        "values": (squared(values - layer.values), size["values"]),
        "keys_theory": (key_noise, size["keys"]),
        "values_theory": (value_noise, size["values"]),
        **{name: (squared(output - exact), squared(exact)) for name, output in outputs.items()},
    }


def summary(form: Format, head_size: int, sums: torch.Tensor, names: Sequence[str]) -> Record:
    """Return one format's figures from its sums, [layers, names, (error, size)]."""
    per_layer = (sums[..., 0] / sums[..., 1]).sqrt()
    total = sums.sum(dim=0)
    overall = (total[:, 0] / total[:, 1]).sqrt()
    figures = {
        name: {
            "all": _rounded(float(overall[i])),
            "per_layer": [_rounded(float(error)) for error in per_layer[:, i]],
        }
        for i, name in enumerate(names)
    }
    sides = (form.keys, form.values)
    num_bytes = {name: side.num_bytes(head_size) for name, side in zip(SIDES, sides, strict=True)}
    return {"format": form.name, "family": form.family, "bytes": num_bytes, "errors": figures}


def _rounded(error: float) -> float | None:
    return None if math.isnan(error) else float(f"{error:.4g}")


def outliers(layers: Sequence[Layer]) -> Record:
    """Return how far the largest channel sticks out: its RMS over the median channel's, a layer."""
    found = {}
    for name in SIDES:
        channels = [getattr(layer, name).square().mean(dim=1).sqrt() for layer in layers]
        ratios = [channel.amax(-1) / channel.median(-1).values for channel in channels]
        found[name] = [round(float(ratio.mean()), 2) for ratio in ratios]
    return found


def measure(arguments: argparse.Namespace) -> tuple[list[Record], Record]:
    """Return the figures of every format, and what the caches looked like."""
    forms = [*our_formats(), *vllm_formats()]
    sums: list[torch.Tensor | float] = [0.0] * len(forms)
    lengths, head_size, names, sticking_out = [], 0, [], {}
    for layers in read_caches(arguments):
        lengths.append(layers[0].keys.shape[1])
        head_size = layers[0].keys.shape[2]
        sticking_out = sticking_out or outliers(layers)
        for i, form in enumerate(forms):
            found = [layer_sums(layer, form) for layer in layers]
            names = list(found[0])
            sums[i] = sums[i] + torch.tensor(
                [list(one.values()) for one in found], dtype=torch.float64
            )
    results = [
        summary(form, head_size, total, names) for form, total in zip(forms, sums, strict=True)
    ]
    seen = {"lengths": lengths, "head_size": head_size, "largest_channel": sticking_out}
    return results, seen


def results_table(results: Sequence[Record]) -> Table:
    """Return the results as a table for people; errors in percent."""
    table = Table(title="Relative error in %, and bytes of one token and head")
    for name in ("format", "K bytes", "K", "theory", "V bytes", "V", "theory", *OUTPUTS.values()):
        table.add_column(name, justify="left" if name == "format" else "right")
    for result in results:
        row = [result["format"]]
        for side in SIDES:
            row.append(f"{result['bytes'][side]:g}")
            row += [_percent(result["errors"][name]["all"]) for name in (side, f"{side}_theory")]
        row += [_percent(result["errors"][name]["all"]) for name in OUTPUTS]
        table.add_row(*row)
    return table


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.3g}"


def draw(record: Record, path: Path) -> None:
    """Draw error against bytes: keys, values, attention; a colour a codec, hollow if plain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 6.5))
    titles = ("keys", "values", "attention output, keys and values restored")
    for axis, name, title in zip(axes, (*SIDES, "output"), titles, strict=True):
        draw_panel(axis, record["results"], name)
        axis.set_title(title)
        axis.set_xlabel("bytes of one token and head" + (", keys and values" * (name == "output")))
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("relative error  ||x - x^|| / ||x||")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(lines, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    # No date and no version inside: the same results give the same file.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def draw_panel(axis: Any, results: Sequence[Record], name: str) -> None:
    """Draw one panel: circles and squares for ours, black for vLLM's, a dash for the theory."""
    ours = [result["format"] for result in results if result["family"] == OURS]
    colours = {form: f"C{i}" for i, form in enumerate(f for f in ours if ROTATED not in f)}
    shapes = iter("xP*^v<")
    for result in results:
        form, is_ours = result["format"], result["family"] == OURS
        place = sum(result["bytes"].values()) if name == "output" else result["bytes"][name]
        error = result["errors"][name]["all"]
        colour = colours[form.removesuffix(ROTATED)] if is_ours else "black"
        style = {"marker": "o" if is_ours else next(shapes), "color": colour, "s": 50}
        if form.startswith("kivi"):
            # Larger: KIVI's values are those of another codec, in the same place.
            style |= {"marker": "s", "s": 130, "zorder": 0.5}
        if is_ours and ROTATED not in form:
            style |= {"facecolors": "none", "linewidths": 1.6}
        label = form if is_ours else f"vLLM {form}"
        axis.scatter(place, error, label=label, alpha=0.8, **style)
        theory = result["errors"].get(f"{name}_theory", {}).get("all")
        if theory is not None:
            axis.scatter(place, theory, marker="_", color=colour, s=160, linewidths=1)
    axis.scatter([], [], marker="_", color="grey", s=160, label="theory: steps, codebook")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks_help = "what the documents are about, one document each"
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help=tasks_help)
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens in a document")
    parser.add_argument("--queries", type=int, default=64, help="last queries that attend")
    parser.add_argument("--seed", type=int, default=50_000, help="draws the documents")
    parser.add_argument("--toy", action="store_true", help="one short document, as a check")
    parser.add_argument("--plot-only", action="store_true", help="draw the record that is there")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_codecs.json")
    parsed = parser.parse_args(arguments)
    if parsed.toy:
        vars(parsed).update(TOY)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every format, write the record and its plot, and print the table."""
    parsed = parse_arguments(arguments)
    console = Console(width=120)
    if parsed.plot_only:
        record = read_record(parsed.output)
    else:
        with console.status("codecs on the bundled model's cache"):
            results, seen = measure(parsed)
        settings = {name: getattr(parsed, name) for name in ("tasks", "num_tokens", "queries")}
        settings |= {"model": "testbed", "dtype": "float32", "group_tokens": GROUP_TOKENS, **seen}
        settings["transformers"] = transformers.__version__
        seeds = {"documents": parsed.seed, "signs": SIGNS_SEED}
        record = make_record("codecs", settings=settings, seeds=seeds, results=results)
        write_record(parsed.output, record)
    draw(record, parsed.output.with_suffix(".png"))
    console.print(results_table(record["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
