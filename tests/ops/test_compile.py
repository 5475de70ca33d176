"""Every kernel compiles for every architecture, under each Triton that vLLM may bring."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
sys.path.insert(0, str(SCRIPT.parent))

import compile_kernels  # noqa: E402
import setup_env  # noqa: E402

RECORD = SCRIPT.parent / "results" / "kernel_variants.json"

# Set-up puts these beside the environment's own Triton: the one that torch 2.13 pins for CUDA, with
# which vLLM 0.32 runs our kernels on a GPU, and an older one.
OF_CUDA, OLDER, INSTALLED = "3.7.1", "3.6.0", metadata.version("triton")
PATHS = {
    INSTALLED: None,
    OF_CUDA: Path(sys.prefix) / "triton-3.7",
    OLDER: Path(sys.prefix) / "triton-3.6",
}
ARCHITECTURES = {80, 89, 90, 100}


def python(*arguments, triton=OF_CUDA, **variables):
    """Runs a script in a process that compiles kernels instead of interpreting them."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", **variables}
    if not variables:
        environment.pop("TRITON_INTERPRET", None)
    if PATHS[triton]:
        environment["PYTHONPATH"] = str(PATHS[triton])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("triton", "choice"),
    [
        # What the record does not have of exactly this code, and a share of what it has.
        pytest.param(OF_CUDA, ("--known", RECORD, "--part", "1/16"), id=OF_CUDA),
        pytest.param(OLDER, ("--known", RECORD, "--part", "9/16"), id=OLDER),
        pytest.param(OF_CUDA, (), id=f"{OF_CUDA}-anew", marks=pytest.mark.full),
        pytest.param(OLDER, (), id=f"{OLDER}-anew", marks=pytest.mark.full),
        pytest.param(INSTALLED, (), id="installed-anew", marks=pytest.mark.full),
    ],
)
def test_every_kernel_compiles_without_spilling(triton, choice, tmp_path):
    report = tmp_path / "report.json"

    done = python(SCRIPT, "--json", report, *choice, triton=triton)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(report.read_text())[triton]
    assert result["triton"] == triton
    assert result["problems"] == []
    assert all(one["registers"] > 0 for one in result["variants"])
    compiled = {(one["op"], one["architecture"]) for one in result["variants"]}
    ops = {path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")}
    assert {"physical_tables", "window_scores"} <= ops
    assert compiled == {(op, architecture) for op in ops for architecture in ARCHITECTURES}


def test_the_same_code_is_not_compiled_twice(tmp_path):
    first, again, changed = (tmp_path / f"{name}.json" for name in ("first", "again", "changed"))
    only = ("--op", "physical_tables")

    assert python(SCRIPT, *only, "--json", first).returncode == 0
    recorded = json.loads(first.read_text())
    taken = python(SCRIPT, *only, "--known", first, "--part", "1/16", "--json", again)
    recorded[OF_CUDA]["variants"][-1]["fingerprint"] = "of other code"
    changed.write_text(json.dumps(recorded))
    renewed = python(SCRIPT, *only, "--known", changed, "--part", "1/16", "--json", changed)
    elsewhere = python(SCRIPT, *only, "--known", first, "--part", "1/16", triton=OLDER)

    assert "16 variants of 1 operations, 1 of them compiled" in taken.stdout
    assert "16 variants of 1 operations, 2 of them compiled" in renewed.stdout
    assert "16 variants of 1 operations, 16 of them compiled" in elsewhere.stdout
    for report in (again, changed):
        assert recorded_code(report) == recorded_code(first)


def recorded_code(path):
    """What was recorded but for how long it took."""
    variants = json.loads(path.read_text())[OF_CUDA]["variants"]
    return [{key: one[key] for key in one if key != "seconds"} for one in variants]


KERNEL = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})

import triton
import triton.language as tl
from compile_kernels import fingerprint
from vllm_kvpress.kernels.variants import Variant


@triton.jit
def scaled(numbers):
    return numbers * 2


@triton.jit
def kernel(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), scaled(tl.arange(0, SIZE)))


print(fingerprint(Variant("name", kernel, {{"out": "*fp32"}}, {{"SIZE": 32}}, 4, 1, 80)))
"""


@pytest.mark.parametrize("triton", [OF_CUDA, OLDER])
def test_a_fingerprint_is_of_everything_that_is_compiled(triton, tmp_path):
    changes = [
        ("", ""),
        ("numbers * 2", "numbers * 3"),  # what the kernel calls
        ('"*fp32"', '"*fp16"'),
        ("32}", "64}"),
        ("4, 1, 80", "8, 1, 80"),
        ("4, 1, 80", "4, 2, 80"),
        ("4, 1, 80", "4, 1, 90"),
        ("4, 1, 80", "4, 1, 80, 128"),
        ('"name"', '"another name"'),
    ]
    seen = []
    for number, (old, new) in enumerate(changes):
        path = tmp_path / f"kernel_{number}.py"
        path.write_text(KERNEL.replace(old, new))
        seen.append(python(path, triton=triton).stdout.strip())

    assert all(seen)
    assert seen[-1] == seen[0]
    assert len(set(seen)) == len(changes) - 1


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_share_out_all_variants(parts):
    """Each once, and each part has every variant on its share of the architectures."""
    everything = names_of((1, 1))
    shares = [names_of((part, parts)) for part in range(1, parts + 1)]

    assert sorted(name for share in shares for name in share) == sorted(everything)
    without_fp8 = [name for name in everything if "fp8" not in name]
    for share in shares:
        found = Counter(anywhere(name) for name in share if "fp8" not in name)
        assert set(found) == {anywhere(name) for name in without_fp8}
        assert set(found.values()) == {4 // parts}


def names_of(part):
    return [variant.name for _, variant in compile_kernels.Choice(part=part).variants()]


def anywhere(name):
    """A variant's name without its architecture."""
    return re.sub(r"(sm_?|paged_attention-)(80|89|90|100)", r"\1", name)


@pytest.mark.parametrize("triton", [OF_CUDA, OLDER])
def test_the_recorded_table_is_whole_and_without_problems(triton):
    recorded = json.loads(RECORD.read_text())[triton]

    assert recorded["problems"] == []
    assert all(one["fingerprint"] for one in recorded["variants"])
    assert {(one["op"], one["name"]) for one in recorded["variants"]} == {
        (op, variant.name) for op, variant in compile_kernels.Choice().variants()
    }


@pytest.mark.parametrize("triton", [OF_CUDA, OLDER])
def test_set_up_puts_tritons_beside_the_environment(triton):
    path = PATHS[triton]

    assert path.is_dir(), f"set-up puts Triton {triton} into {path}: run make setup"
    assert setup_env.TRITONS[path.name] == triton


# Kernels that are wrong on purpose, and one that is not.
BAD_KERNELS = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})

import triton
import triton.language as tl
from compile_kernels import check, complaints
from vllm_kvpress.kernels.variants import Variant


@triton.jit
def center(out, values, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    numbers = tl.load(values + place)
    tl.store(out + place, numbers - tl.sum(numbers, axis=0))


@triton.jit
def multiply(out, left, right, SIZE: tl.constexpr, STEPS: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(STEPS):
        a = tl.load(left + step * SIZE * SIZE + place)
        b = tl.load(right + step * SIZE * SIZE + place)
        total = tl.dot(a, b, total)
    tl.store(out + place, total)


@triton.jit
def broken(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), tl.arange(0, 2 * SIZE))


def variant(name, kernel, constants, num_warps=4, num_stages=1, architecture=80):
    types = {{"left": "*fp16", "right": "*fp16"}}
    signature = {{one: types.get(one, "*fp32") for one in kernel.arg_names if one not in constants}}
    return Variant(name, kernel, signature, constants, num_warps, num_stages, architecture)


if __name__ == "__main__":
    product = {{"SIZE": 128, "STEPS": 64}}
    records = check([
        ("demo", variant("good", center, {{"SIZE": 1024}})),
        ("demo", variant("spills", center, {{"SIZE": 16384}}, num_warps=1)),
        ("demo", variant("fits", multiply, product, 8, 2, 89)),
        ("demo", variant("too much shared", multiply, product, 8, 4, 89)),
        ("demo", variant("broken", broken, {{"SIZE": 64}})),
        ("demo", variant("good", center, {{"SIZE": 2048}})),
    ])
    print(*complaints(records), sep="\\n")
    print(*complaints([]), sep="\\n")
"""


@pytest.mark.parametrize("triton", [OF_CUDA, OLDER])
def test_what_a_kernel_can_do_wrong_is_reported(triton, tmp_path):
    path = tmp_path / "bad_kernels.py"
    path.write_text(BAD_KERNELS)

    done = python(path, triton=triton)

    assert done.returncode == 0, done.stderr
    # An error of the compiler has several lines.
    lines = [line for line in done.stdout.splitlines() if line.startswith(("demo", "good", "no "))]
    spills, shared, broken, twice, nothing = lines
    assert spills.startswith("demo: spills: spills registers: ")
    assert " 0 bytes stored" not in spills
    assert shared.startswith("demo: too much shared: needs ")
    assert shared.endswith(f"bytes of shared memory; sm_89 has {99 * 1024}")
    assert broken.startswith("demo: broken: does not compile: ")
    assert twice == "good: 2 variants have this name"
    assert nothing == "no variant was chosen, so nothing was checked"


def test_status_tells_that_something_is_wrong():
    """The status is what CI sees: 1 for a variant that fails, here one that no GPU has room for."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import compile_kernels
records = [compile_kernels.Record("demo", "large", 80, registers=32, shared=163 * 1024 + LESS)]
compile_kernels.check_in_processes = lambda *arguments: (records, 1)
sys.exit(compile_kernels.main(["--jobs", "1"]))
"""

    bad = python("-c", code.replace("LESS", "1"))
    good = python("-c", code.replace("LESS", "0"))

    assert (bad.returncode, good.returncode) == (1, 0)
    assert "needs 166913 bytes of shared memory; sm_80 has 166912" in bad.stdout
    assert "1 variants of 1 operations, 1 of them compiled" in good.stdout


def test_one_operation_and_one_architecture_can_be_chosen(tmp_path):
    report = tmp_path / "report.json"

    done = python(SCRIPT, "--op", "physical_tables", "--arch", "90", "--json", report)

    assert done.returncode == 0, done.stdout + done.stderr
    variants = json.loads(report.read_text())[OF_CUDA]["variants"]
    chosen = {(one["op"], one["architecture"]) for one in variants}
    assert chosen == {("physical_tables", 90)}


def test_a_rerun_of_an_operation_keeps_the_records_of_others(tmp_path):
    path = tmp_path / "variants.json"
    first = {
        "triton": "3.7.1",
        "command": "all",
        "seconds": 9.0,
        "problems": ["a: x: bad", "b: y: bad"],
    }
    again = {"triton": "3.7.1", "command": "a alone", "seconds": 1.0, "problems": []}
    record = compile_kernels.Record

    compile_kernels.write_json(path, first, [record("a", "x", 80), record("b", "y", 80)])
    compile_kernels.write_json(path, again, [record("a", "z", 80, registers=32)], ["a"])

    found = json.loads(path.read_text())["3.7.1"]
    assert [one["name"] for one in found["variants"]] == ["z", "y"]
    assert found["problems"] == ["b: y: bad"]
    assert (found["command"], found["reruns"]) == ("all", [{"command": "a alone", "seconds": 1.0}])


def test_unknown_operations_and_files_and_the_interpreter_are_refused():
    unknown = python(SCRIPT, "--op", "physical")
    missing = python(SCRIPT, "--known", "none.json")
    interpreted = python(SCRIPT, "--op", "physical_tables", TRITON_INTERPRET="1")

    assert (unknown.returncode, missing.returncode) == (2, 2)
    assert "--known: no such file: none.json" in missing.stderr
    assert "--op: got 'physical'; allowed: " in unknown.stderr
    assert interpreted.returncode != 0
    assert "TRITON_INTERPRET is set" in interpreted.stderr
