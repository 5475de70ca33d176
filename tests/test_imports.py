"""Who may import whom: the table of design and CONTRIBUTING, checked on every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvpress.config import known_policies, load_policy

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vllm_kvpress"
KERNELS = ROOT / "kernels"

OURS = "vllm_kvpress"
LEAVES = {
    f"{OURS}.errors",
    f"{OURS}.schema",
    f"{OURS}.config",
    f"{OURS}.sources",
    f"{OURS}.overrides",
}
FIGURES = {
    f"{OURS}.plan",
    f"{OURS}.packed_plan",
    f"{OURS}.demoting_plan",
    f"{OURS}.planner",
    f"{OURS}.skip_groups",
    f"{OURS}.plan_rows",
    f"{OURS}.layout",
    f"{OURS}.conflict_table",
    f"{OURS}.window_plan",
    f"{OURS}.head_groups",
    f"{OURS}.head_figures",
}
PLANS = {f"{OURS}.plan", f"{OURS}.packed_plan", f"{OURS}.demoting_plan"}

# Room -> (packages from outside, rooms of ours), beside the standard library. Imports for types
# only do not count: they do not run.
TABLE = {
    "errors": (set(), set()),
    "sources": ({"yaml"}, LEAVES),
    "overrides": (set(), LEAVES),
    "schema": ({"pydantic"}, {f"{OURS}.errors"}),
    "config": ({"pydantic", "pydantic_core"}, LEAVES),
    "scorer_rules": (set(), {f"{OURS}.errors", f"{OURS}.head_rules"}),
    "plan": (set(), {f"{OURS}.errors", f"{OURS}.layout"}),
    "packed_plan": (set(), {f"{OURS}.plan", f"{OURS}.errors"}),
    "demoting_plan": (set(), {f"{OURS}.plan", f"{OURS}.packed_plan", f"{OURS}.errors"}),
    "skip_groups": (set(), {f"{OURS}.errors"}),
    "planner": (set(), {*PLANS, f"{OURS}.errors"}),
    "plan_rows": ({"numpy"}, PLANS),
    "window_plan": (set(), set()),
    "window_rows": ({"numpy"}, {f"{OURS}.window_plan"}),
    "head_groups": (set(), set()),
    "head_figures": (
        set(),
        {f"{OURS}.window_plan", f"{OURS}.head_groups", f"{OURS}.packed_plan", f"{OURS}.planner"},
    ),
    "head_rules": (set(), {f"{OURS}.errors"}),
    "layout": ({"numpy"}, {f"{OURS}.errors"}),
    "conflict_table": (set(), {f"{OURS}.errors"}),
    "policies": (
        {"torch", "pydantic"},
        {
            *LEAVES,
            f"{OURS}.scorer_rules",
            f"{OURS}.layout",
            f"{OURS}.kernels.window_scores",
            f"{OURS}.policies",
        },
    ),
    "kernels": ({"torch", "triton"}, {f"{OURS}.kernels"}),
    "cli": (
        {"rich", "yaml", "huggingface_hub"},
        {
            *LEAVES,
            *FIGURES,
            f"{OURS}.policies",
            f"{OURS}.cli",
            f"{OURS}.testbed",
            f"{OURS}.evaluation",
            f"{OURS}.calibration",
            OURS,
        },
    ),
    "calibration": (
        {"torch", "transformers", "rich", "matplotlib"},
        {*LEAVES, f"{OURS}.policies", f"{OURS}.testbed", f"{OURS}.calibration"},
    ),
    "evaluation": (
        {
            "numpy",
            "rich",
            "huggingface_hub",
            "matplotlib",
            "datasets",
            "transformers",
            "torch",
            "vllm",
        },
        {*LEAVES, f"{OURS}.policies", f"{OURS}.testbed", f"{OURS}.evaluation"},
    ),
}
# Rooms that only promise not to import vLLM.
WITHOUT_VLLM = {*TABLE, "testbed", "configs"} - {"evaluation"}
# Imported by `import vllm_kvpress.cli`; everything heavy comes when a command needs it.
LIGHT = ("vllm_kvpress", "vllm_kvpress.cli", "vllm_kvpress.config", "vllm_kvpress.plan")


def room_of(path):
    if path.is_relative_to(KERNELS):
        return "kernels"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_for_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path):
    """The full names of all modules that a file imports, anywhere in it, when it runs."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    names = set()
    while pending:
        node = pending.pop()
        if is_for_types_only(node):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from package import x`: x may be a module, which has the room of its package or less.
            names.add(node.module)
            if node.module == OURS:
                names |= {f"{OURS}.{alias.name}" for alias in node.names if alias.name[0] != "_"}
        pending += ast.iter_child_nodes(node)
    return names


def files(*rooms):
    every = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    return [path for path in sorted(every) if room_of(path) in rooms]


def within(name, allowed):
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize("path", files(*TABLE), ids=lambda path: str(path.relative_to(ROOT)))
def test_direction_of_dependence(path):
    outside, inside = TABLE[room_of(path)]
    # The bare package is only its version; it imports nothing.
    own = {name for name in imports(path) if within(name, {OURS}) and name != OURS}
    foreign = {name.partition(".")[0] for name in imports(path) if not within(name, {OURS})}

    assert {name for name in own if not within(name, inside)} == set()
    assert foreign - set(sys.stdlib_module_names) <= outside


@pytest.mark.parametrize("room", sorted(WITHOUT_VLLM))
def test_only_integration_imports_vllm(room):
    importing = [str(path) for path in files(room) if within_any(imports(path), "vllm")]

    assert importing == []


def test_of_the_evaluation_only_the_engine_s_process_imports_vllm():
    importing = [path for path in files("evaluation") if within_any(imports(path), "vllm")]

    assert importing == [PACKAGE / "evaluation" / name for name in ("forced.py", "runner.py")]


def within_any(names, package):
    return any(within(name, {package}) for name in names)


def test_the_table_covers_every_room():
    every = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    rooms = {room_of(path) for path in every}

    assert rooms - {"__init__"} <= {*WITHOUT_VLLM, "integration", "evaluation"}


def run_python(code, *options):
    """Runs code in a fresh interpreter at the repository's root."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize("module", LIGHT)
def test_import_is_light(module):
    code = f"import sys, {module}\nprint(*{{'torch', 'vllm', 'triton'}} & set(sys.modules))"

    done = run_python(code)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_scorer_runs_where_vllm_and_triton_cannot_be_imported():
    code = """
import sys
sys.modules["vllm"] = sys.modules["triton"] = None
import torch
from vllm_kvpress.config import known_policies, load_policy
from vllm_kvpress.policies import LayerObservation, resolve, select_tokens

observation = LayerObservation(
    keys=torch.randn(2, 100, 16), values=torch.randn(2, 100, 16),
    queries=torch.randn(4, 32, 16), positions=torch.arange(100).repeat(2, 1),
    layer_idx=0, kv_heads=(0, 1), scale=0.25)
for info in known_policies():
    scorer = resolve(load_policy(info.name))
    if scorer.selects == "all":
        continue
    scores = scorer.score(observation)
    assert select_tokens(scores, 80, 4, 64).shape == (2, 80)
    print(info.name)
"""

    done = run_python(code)

    assert done.returncode == 0, done.stderr
    scored = [info for info in known_policies() if load_policy(info.name).evict is not None]
    assert len(done.stdout.split()) == len(scored)


def test_no_module_of_ours_is_called_kernels():
    """transformers imports Hugging Face's `kernels` by that name: ours must not be found first."""
    code = "import importlib.util as u; print(getattr(u.find_spec('kernels'), 'origin', None))"

    # -I: neither the working directory nor PYTHONPATH, only what is installed.
    origin = run_python(code, "-I").stdout.strip()

    assert origin == "None" or not Path(origin).is_relative_to(ROOT)
