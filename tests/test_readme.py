"""README.md's Python runs from top to bottom, as one program, and what it names exists."""

import ast
import importlib.util
import pathlib
import re

import pytest
from foreign_files import language_model, published

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


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


def test_code_blocks_run(tmp_path, monkeypatch):
    for package in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    sentences = [
        "The film was fine , and its ending finer .",
        "Nobody knows where the river ends .",
        "It never ends .",
    ]
    (tmp_path / "wiki.txt").write_text("\n".join(sentences * 200), encoding="utf-8")
    published(tmp_path / "wt103-fwd.tgz", language_model())
    for i in range(40):
        review = tmp_path / "reviews" / ("train", "test")[i % 5 // 4] / ("pos", "neg")[i % 2] / f"{i}.txt"
        review.parent.mkdir(parents=True, exist_ok=True)
        review.write_text(" ".join(sentences[i % 3 :]), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 8
    namespace = {}
    for block in blocks:
        if absent(block[1]):
            continue
        above = text[: block.start(1)].count("\n")  # so that a failure shows README's own line
        exec(compile("\n" * above + block[1], str(README), "exec"), namespace)
    assert namespace["clf"].predict(["A fine film ."])[0] in ("good", "bad")


def test_files_and_make_targets_exist():
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in re.findall(r"\bmake ([a-z-]+)", text):
        assert name in targets, name
