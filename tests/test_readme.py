"""The pages' Python runs, each page as one program; their links, make targets and tables hold."""

import ast
import importlib.util
import pathlib
import re

import pytest
from foreign_files import language_model, published

ROOT = pathlib.Path(__file__).parent.parent
WITH_CODE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WITH_CODE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"]
PAGES += sorted((ROOT / "benchmarks/results").glob("*.md"))
pytestmark = pytest.mark.skipif(not WITH_CODE[0].exists(), reason="needs the source tree")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SENTENCES = [
    "The film was fine , and its ending finer .",
    "Nobody knows where the river ends .",
    "It never ends .",
]


def name(page):
    return str(page.relative_to(ROOT))


def absent(code):
    """The packages that a block imports at its top and that are not installed here."""
    names = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]


def test_a_block_that_needs_what_is_not_installed_is_known():
    assert absent("import torch.nn as nn\nfrom ulmfit_fast import ops\nx = 1") == []
    assert absent("import torch, not_there.part\nfrom nor_this import x") == ["not_there.part", "nor_this"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the blocks read, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for archive in ("wt103-fwd.tgz", "wt103-bwd.tgz"):
        published(tmp_path / archive, language_model())
    for i in range(40):
        review = tmp_path / "reviews" / ("train", "test")[i % 5 // 4] / ("pos", "neg")[i % 2] / f"{i}.txt"
        review.parent.mkdir(parents=True, exist_ok=True)
        review.write_text(" ".join(SENTENCES[i % 3 :]), encoding="utf-8")


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_blocks_run(page, files):
    """Each page is one program, from top to bottom."""
    for package in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    text = page.read_text(encoding="utf-8")
    namespace = {}
    for block in BLOCK.finditer(text):
        if block[1] != "python" or absent(block[2]):
            continue
        above = text[: block.start(2)].count("\n")  # so that a failure shows the page's own line
        exec(compile("\n" * above + block[2], str(page), "exec"), namespace)
    if page.name == "README.md":
        assert namespace["clf"].predict(["A fine film ."])[0] in ("good", "bad")


def test_pages_have_code():
    counts = {page.name: page.read_text(encoding="utf-8").count("```python\n") for page in WITH_CODE}
    assert counts["README.md"] >= 8
    assert all(counts[f"{page}.md"] for page in ("checkpoints", "export", "fastai", "salesforce", "stages"))


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue
        target = page.parent / path if path else page
        if target.suffix == ".png" and not (ROOT / ".git").exists():
            continue  # the source archive has no pictures
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page for page in PAGES[1:] if "results" not in page.parts]
    assert not [page for page in pages if f"]({name(page)}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)", text)
    named += [
        n for block in BLOCK.finditer(text) for n in re.findall(r"^make ([a-z-]+)", block[2], re.MULTILINE)
    ]
    assert not set(named) - set(targets)


def test_tables_are_those_of_the_records(monkeypatch):
    """What `make readme` would write is there already."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT))
    import readme_numbers

    from benchmarks.record import RESULTS, load_all, recency

    if not all(recency(record)[1] for record in load_all(RESULTS, "speed")):
        pytest.skip("needs git's history, by which the records are ordered")
    for page, contents in readme_numbers.blocks().items():
        assert readme_numbers.filled(page, contents) == (ROOT / page).read_text(encoding="utf-8"), page
