"""Text that every installation has: documentation of the Python standard library and of torch."""

import ast
import pathlib
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterable, Iterator

import torch

Labelled = tuple[list[str], list[str]]  # texts, and the label of each

# Sub-packages of torch, the classes of the demo's classifier.
PACKAGES = ("ao", "cuda", "distributed", "distributions", "fx", "nn", "onnx", "optim")
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "ensurepip",
}


def general_text(max_words: int = 300_000) -> list[str]:
    """Help topics and documentation strings of the standard library, in a fixed order, about `max_words`
    words.
    """
    topics = [
        " ".join(part.split())
        for name in sorted(pydoc_data.topics.topics)
        for part in pydoc_data.topics.topics[name].split("\n\n")
    ]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(p.relative_to(root).parts)]
    return _take(files, max_words, start=[t for t in topics if t])


def labelled_text(most: int = 400, max_words: int = 100) -> Labelled:
    """(texts, labels): documentation strings of torch, cut to `max_words` words; the label is their
    sub-package.

    At most `most` of each sub-package; one that this torch lacks or that has under 40 is left out.
    """
    texts: list[str] = []
    labels: list[str] = []
    for package in PACKAGES:
        files = sorted((pathlib.Path(torch.__file__).parent / package).rglob("*.py"))
        found = _take(files, most * max_words, most=most, cut=max_words, least=8)
        if len(found) >= 40:
            texts += found
            labels += [package] * len(found)
    return texts, labels


def split(
    texts: list[str], labels: list[str], share: float = 0.2, seed: int = 0
) -> tuple[Labelled, Labelled]:
    """((texts, labels) to train on, (texts, labels) held out): a random `share` of each class is held out."""
    chooser = random.Random(seed)
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for label in sorted(set(labels)):
        mine = [t for t, other in zip(texts, labels, strict=True) if other == label]
        chooser.shuffle(mine)
        held = round(len(mine) * share)
        test.extend((t, label) for t in mine[:held])
        train.extend((t, label) for t in mine[held:])
    return _columns(train), _columns(test)


def _columns(pairs: list[tuple[str, str]]) -> Labelled:
    return [text for text, _ in pairs], [label for _, label in pairs]


def _take(
    files: Iterable[pathlib.Path],
    max_words: int,
    most: int | None = None,
    cut: int | None = None,
    least: int = 3,
    start: Iterable[str] = (),
) -> list[str]:
    """Documentation strings of `files`, read in a random but fixed order, each once, until there are
    enough.
    """
    files = list(files)
    random.Random(0).shuffle(files)
    taken = dict.fromkeys(start)
    words = sum(len(t.split()) for t in taken)
    for file in files:
        for text in _docstrings(file):
            parts = text.split()[:cut]
            text = " ".join(parts)
            if len(parts) >= least and text not in taken:
                taken[text] = None
                words += len(parts)
            if words >= max_words or (most and len(taken) >= most):
                return list(taken)
    return list(taken)


def _docstrings(file: pathlib.Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
