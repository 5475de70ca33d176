"""The documents say what the code says: policies, refusals, files, examples."""

import re
from pathlib import Path

import pytest
import yaml

from vllm_kvpress.config import known_policies, load_policy
from vllm_kvpress.conflict_table import ALLOWED, REFUSED
from vllm_kvpress.policies import resolve
from vllm_kvpress.policies.registry import make_scorer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "outside_scorer"
DOCUMENTS = sorted(
    path
    for folder, pattern in ((ROOT, "*.md"), (ROOT / "configs", "*.md"), (ROOT / "docs", "**/*.md"))
    for path in folder.glob(pattern)
)
# What the example is made of, in the order in which CONTRIBUTING shows it.
EXAMPLE_FILES = {
    "toml": "pyproject.toml",
    "python": "kvpress_example_peak.py",
    "yaml": "peak.yaml",
}
PUBLIC_HOSTS = {"arxiv.org", "github.com", "keepachangelog.com", "semver.org"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def section(text, title):
    """The text between a heading and the next one of its level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text):
    """The table rows of a text, as lists of cells, without heads and rules."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def relative(path):
    return str(path.relative_to(ROOT))


def test_the_policy_table_has_exactly_the_known_policies():
    names = [row[0].strip("` ") for row in rows(section(read("README.md"), "Policies"))]

    assert names == [info.name for info in known_policies()]


@pytest.mark.parametrize("info", known_policies(), ids=lambda info: info.name)
def test_a_policy_s_row_says_its_paper_its_file_its_needs_and_when(info):
    table = rows(section(read("README.md"), "Policies"))
    _, _, paper, file, needs, decoding = next(row for row in table if f"`{info.name}`" in row[0])
    policy = load_policy(info.name)
    scorer = resolve(policy)

    assert re.findall(r"\d{4}\.\d{5}", info.paper) == re.findall(r"\[(\d{4}\.\d{5})\]", paper)
    assert file == f"[{info.name}.yaml](configs/{info.name}.yaml)"
    assert needs == (", ".join(sorted(scorer.needs)) or "nothing")
    by_position, by_queries = scorer.selects in ("window", "all"), "queries" in scorer.needs
    demotes = policy.evict is not None and policy.evict.losers == "demote"
    once = by_queries or demotes
    assert decoding == ("every block" if by_position else "no" if once else "if asked")


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.key)
def test_the_readme_lists_every_refusal(row):
    refused = " ".join(
        row[0] for row in rows(section(read("README.md"), "What it cannot be combined with"))
    )

    assert row.what in refused.replace("`", "")


def test_the_readme_lists_what_is_allowed():
    text = " ".join(section(read("README.md"), "What it cannot be combined with").split())

    assert [what for what in ALLOWED if what not in text] == []


@pytest.mark.parametrize("language", EXAMPLE_FILES)
def test_contributing_shows_the_example_as_it_is(language):
    (shown,) = blocks(read("CONTRIBUTING.md"), language)

    assert shown == (EXAMPLE / EXAMPLE_FILES[language]).read_text(encoding="utf-8")


def test_the_example_is_under_sixty_lines():
    texts = [(EXAMPLE / name).read_text(encoding="utf-8") for name in EXAMPLE_FILES.values()]

    assert sum(len(text.splitlines()) for text in texts) < 60
    ours = {path.name for path in EXAMPLE.iterdir() if path.suffix in (".py", ".toml", ".yaml")}
    assert ours == set(EXAMPLE_FILES.values())


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_policies_in_a_document_are_valid(path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    for block in blocks(path.read_text(encoding="utf-8"), "yaml"):
        scorer = load_policy(yaml.safe_load(block)).evict.scorer
        if scorer.name == "peak":  # of the example, which is not installed here
            module = "kvpress_example_peak:PeakScorer"
            scorer = scorer.model_copy(update={"name": None, "path": module})

        assert make_scorer(scorer)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]

    assert [link for link in local if not (path.parent / link).exists()] == []


def test_the_tree_in_the_readme_exists():
    (tree,) = blocks(section(read("README.md"), "The repository"), "")
    parents, missing = [ROOT], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*((?:[\w.]+/?(?: |$))+)", line).group(1).split()
        missing += [name for name in names if not (parents[depth] / name).exists()]
        parents[depth + 1 :] = [parents[depth] / names[0]]

    assert missing == []


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *(EXAMPLE / name for name in EXAMPLE_FILES.values())], ids=relative
)
def test_nothing_of_one_machine_is_named(path):
    text = path.read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://([\w.-]+)", text)) - PUBLIC_HOSTS
    absolute = re.findall(r"(?<![\w.)/:])/[a-z]\w*/[\w./-]+", text)

    assert hosts == set()
    assert [name for name in absolute if not name.startswith(("/v1/", "/path/to/"))] == []


@pytest.mark.parametrize("name", ["headline", "memory", "cost", "quality"])
def test_the_readme_keeps_its_result_markers(name):
    text = read("README.md")

    assert text.count(f"<!-- results:{name} -->") == text.count(f"<!-- /results:{name} -->") == 1
    assert text.index(f"<!-- results:{name} -->") < text.index(f"<!-- /results:{name} -->")
