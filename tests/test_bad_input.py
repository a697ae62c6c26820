"""Bad input to the training part: a fitting exception that says what is wrong, and nothing saved is lost."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast.corpus import read_valid

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(24)
ONE = TINY | dict(epochs=1)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return uf.pretrain_lm(TEXTS, tmp_path_factory.mktemp("bad") / "lm", **ONE | SIZES)


@pytest.fixture(scope="module")
def clf(lm):
    return uf.train_classifier(lm, TEXTS, LABELS, lm.path.parent / "clf", **ONE)


@pytest.fixture
def files(tmp_path):
    """A folder of files that are wrong in one way each."""
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "plain.txt").write_text("a text without labels\n")
    (tmp_path / "other.csv").write_text("review,stars\nfine,5\n")
    (tmp_path / "heading.csv").write_text("text,label\n")
    (tmp_path / "short.csv").write_text("label,text\nx,a\ny\n")
    (tmp_path / "void.csv").write_text("")
    (tmp_path / "comma.csv").write_text("text,label\nfine,good\n\nfine, and long,good\n")
    (tmp_path / "open.csv").write_text('text,label\nfine,good\n"fine,good\nfine,good\n')
    (tmp_path / "twice.csv").write_text("text,label,text\na,b,c\n")
    (tmp_path / "blank.csv").write_text("text,label\nfine,good\nfine, \n")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "packed.txt.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "wiki.train.tokens").write_text("a b c\n")
    (tmp_path / "file").write_text("")
    return tmp_path


class Table:
    """As a DataFrame, which yields the names of its columns."""

    columns = ("text", "label")

    def __iter__(self):
        return iter(self.columns)


def pretrain(sources, lm, files, **options):
    uf.pretrain_lm(sources, files / "out", **ONE | SIZES | options)


def classify(texts, labels, lm, files, **options):
    uf.train_classifier(lm, texts, labels, files / "out", **ONE | options)


CASES = {
    "no texts": (lambda m, f: pretrain([], m, f), ValueError, "sources is empty"),
    "empty file": (
        lambda m, f: pretrain(f / "empty.txt", m, f),
        ValueError,
        "sources is empty: 1 files without a line",
    ),
    "one text, no list": (
        lambda m, f: pretrain("a text", m, f),
        TypeError,
        "sources must be a list of texts or paths, or the path of a file, got one str: 'a text'",
    ),
    "bytes": (lambda m, f: pretrain([b"a"], m, f), TypeError, r"sources\[0\] must be str, got bytes"),
    "a number": (lambda m, f: pretrain(["a", 3], m, f), TypeError, r"sources\[1\] must be str, got int: 3"),
    "None": (
        lambda m, f: pretrain(None, m, f),
        TypeError,
        "sources must be a list of texts or paths, .* got NoneType",
    ),
    "too short": (lambda m, f: pretrain(["a"], m, f), ValueError, "too short: 2 tokens"),
    "missing file": (lambda m, f: pretrain([f / "no.txt"], m, f), FileNotFoundError, "no such file.*no.txt"),
    "a folder": (lambda m, f: pretrain([f], m, f), IsADirectoryError, "is a folder; name the files in it"),
    "not UTF-8": (
        lambda m, f: pretrain([f / "latin.txt"], m, f),
        ValueError,
        "not UTF-8: byte 0xef at offset 2.*iconv",
    ),
    "a surrogate": (
        lambda m, f: pretrain(["a b c \ud800"], m, f),
        ValueError,
        r"sources\[0\] is not valid Unicode",
    ),
    "CSV without text": (
        lambda m, f: pretrain([f / "other.csv"], m, f),
        ValueError,
        r"no column 'text'.*\['review', 'stars'\]",
    ),
    "empty CSV": (lambda m, f: pretrain([f / "void.csv"], m, f), ValueError, "no column 'text'"),
    "CSV of a heading": (
        lambda m, f: pretrain([f / "heading.csv"], m, f),
        ValueError,
        "no rows under its heading",
    ),
    "CSV with a short row": (
        lambda m, f: classify(f / "short.csv", None, m, f),
        ValueError,
        "short.csv', line 3: the column 'text' is missing",
    ),
    "CSV with an unquoted comma": (
        lambda m, f: classify(f / "comma.csv", None, m, f),
        ValueError,
        "comma.csv', line 4: 3 fields under 2 columns",
    ),
    "CSV with an open quote": (
        lambda m, f: classify(f / "open.csv", None, m, f),
        ValueError,
        "open.csv', line 3: the row that begins here cannot be read",
    ),
    "CSV with a column twice": (
        lambda m, f: pretrain(f / "twice.csv", m, f),
        ValueError,
        "twice.csv' has more than one column 'text'",
    ),
    "CSV with a blank label": (
        lambda m, f: classify(f / "blank.csv", None, m, f),
        ValueError,
        "blank.csv', line 3: the label is blank",
    ),
    "JSON lines": (lambda m, f: pretrain([f / "lines.jsonl"], m, f), ValueError, "a .jsonl file is not read"),
    "a packed file": (lambda m, f: pretrain(f / "packed.txt.gz", m, f), ValueError, "unpacked text file"),
    "a file's name in a list": (
        lambda m, f: pretrain(["a text", str(f / "wiki.train.tokens")], m, f),
        ValueError,
        r"sources\[1\]='.*wiki.train.tokens' is a file: give pathlib.Path",
    ),
    "a missing path in a list": (
        lambda m, f: m.perplexity([str(f / "wiki one.txt")]),
        ValueError,
        r"texts\[0\]='.*wiki one.txt' looks like a path, but is no file",
    ),
    "a folder in a list": (
        lambda m, f: m.perplexity([str(f)]),
        ValueError,
        r"texts\[0\]='.*' is a folder: give the files in it",
    ),
    "a dict": (lambda m, f: pretrain({"text": TEXTS}, m, f), TypeError, "got a dict: give one column of it"),
    "a dict of labels": (lambda m, f: classify(TEXTS, {}, m, f), TypeError, "labels must be .* got a dict"),
    "perplexity of a table": (lambda m, f: m.perplexity(Table()), TypeError, r"got a Table: .*df\['text'\]"),
    "one-hot labels": (
        lambda m, f: classify(TEXTS, np.eye(2)[[0, 1] * 12], m, f),
        TypeError,
        r"labels\[0\] must be one label, got an array of shape \(2,\)",
    ),
    "a blank label": (
        lambda m, f: classify(TEXTS, ["good", " "] * 12, m, f),
        ValueError,
        r"labels\[1\] is blank: ' '",
    ),
    "empty valid": (lambda m, f: pretrain(TEXTS, m, f, valid=[]), ValueError, "valid is empty"),
    "unknown option": (lambda m, f: pretrain(TEXTS, m, f, lrr=1), ValueError, "'lrr'; did you mean 'lr'"),
    "unknown preset": (lambda m, f: pretrain(TEXTS, m, f, preset="tny"), ValueError, "did you mean 'tiny'"),
    "wrong config": (
        lambda m, f: pretrain(TEXTS, m, f, config=3),
        TypeError,
        "PretrainConfig or a dict, got int",
    ),
    "device": (
        lambda m, f: pretrain(TEXTS, m, f, device="gpu"),
        ValueError,
        "device must be None, 'cpu', 'cuda' .*'gpu'",
    ),
    "progress": (lambda m, f: pretrain(TEXTS, m, f, progress=3), ValueError, "progress must be None, True"),
    "resume and overwrite": (
        lambda m, f: pretrain(TEXTS, m, f, resume=True, overwrite=True),
        ValueError,
        "contradict",
    ),
    "out is a file": (
        lambda m, f: uf.pretrain_lm(TEXTS, f / "file", **ONE),
        NotADirectoryError,
        "out=.*is a file",
    ),
    "out is a number": (
        lambda m, f: uf.pretrain_lm(TEXTS, 3, **ONE),
        TypeError,
        "out must be the path .* got int",
    ),
    "no base": (
        lambda m, f: uf.finetune_lm(f, TEXTS, f / "out"),
        FileNotFoundError,
        "base_run=.* is no run directory",
    ),
    "one class": (
        lambda m, f: classify(TEXTS, ["x"] * 24, m, f),
        ValueError,
        r"at least two classes, got 1: \['x'\]",
    ),
    "labels too few": (lambda m, f: classify(TEXTS, LABELS[:3], m, f), ValueError, "24 texts and 3 labels"),
    "no labels": (lambda m, f: classify(TEXTS, None, m, f), TypeError, "labels is missing"),
    "labels of a text file": (
        lambda m, f: classify(f / "plain.txt", None, m, f),
        ValueError,
        "plain.txt' has no labels",
    ),
    "labels as str": (
        lambda m, f: classify(TEXTS, "x" * 24, m, f),
        TypeError,
        "labels must be a list .* got one str",
    ),
    "mixed labels": (
        lambda m, f: classify(TEXTS, [1, "a"] * 12, m, f),
        TypeError,
        "all str or all int, got 'a'",
    ),
    "float labels": (
        lambda m, f: classify(TEXTS, np.zeros(24), m, f),
        TypeError,
        r"all str or all int, got 0.0 \(float\)",
    ),
    "valid of three": (
        lambda m, f: classify(TEXTS, LABELS, m, f, valid=(TEXTS, LABELS, TEXTS)),
        TypeError,
        r"valid must be \(texts, labels\), or the path of a CSV or TSV .*, got a tuple of 3",
    ),
    "valid without labels": (
        lambda m, f: classify(TEXTS, LABELS, m, f, valid=TEXTS[:2]),
        TypeError,
        r"valid must be \(texts, labels\), or the path .*, got a list of 2",
    ),
    "unknown valid label": (
        lambda m, f: classify(TEXTS, LABELS, m, f, valid=(TEXTS[:1], ["ugly"])),
        ValueError,
        "valid has the label 'ugly'",
    ),
    "no run": (lambda m, f: uf.load(f), FileNotFoundError, "is no run directory: it has no config.json"),
    "perplexity of nothing": (lambda m, f: m.perplexity([]), ValueError, "texts is empty"),
    "perplexity of one token": (lambda m, f: m.perplexity([""]), ValueError, "needs at least 2"),
    "perplexity, a str": (lambda m, f: m.perplexity("abc"), TypeError, "texts must be a list of texts"),
    "perplexity, batch": (
        lambda m, f: m.perplexity(TEXTS, 0),
        ValueError,
        "batch_size must be an integer .* got 0",
    ),
    "generate n": (
        lambda m, f: m.generate("a", -1),
        ValueError,
        "n must be an integer of at least 0, got -1",
    ),
    "generate prompt": (lambda m, f: m.generate(3), TypeError, "prompt must be str, got int"),
    "generate a surrogate": (
        lambda m, f: m.generate("a \ud800"),
        ValueError,
        r"prompt is not valid Unicode: .* at character 2, in 'a \\ud800'",
    ),
    "generate temperature": (
        lambda m, f: m.generate("a", 1, -1),
        ValueError,
        "temperature must be .* got -1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, lm, files):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(lm, files)
    assert not (files / "out").exists()


def test_valid_may_be_the_name_of_a_file_with_labels(files):
    (files / "held.txt").write_text("fine\ndull\n")
    for path in (files / "held.txt", str(files / "held.txt")):
        assert read_valid((path, ["good", "bad"]), ["bad", "good"]) == (["fine", "dull"], ["good", "bad"])


def test_classifier_calls(clf):
    for call, error, message in (
        (lambda: clf.predict("a text"), TypeError, "texts must be a list of texts, got one str"),
        (
            lambda: clf.predict(Table()),
            TypeError,
            "texts must be a list of texts, got a Table: give one column",
        ),
        (lambda: clf.accuracy(TEXTS, [0, 1] * 12), ValueError, "labels has the label 0, which the .* lack"),
        (lambda: clf.accuracy(TEXTS, ["ugly"] * 24), ValueError, "labels has the label 'ugly'"),
        (lambda: clf.predict([1]), TypeError, r"texts\[0\] must be str, got int: 1"),
        (lambda: clf.accuracy(TEXTS, LABELS[:2]), ValueError, "one length, got 24 texts and 2 labels"),
        (lambda: uf.finetune_lm(clf.path, TEXTS, clf.path.parent / "y"), ValueError, "holds a classifier"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tokenizers" else find(name, *a)
    )
    with pytest.raises(ImportError, match="not installed: tokenizers.*pip install tokenizers"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", **ONE)


def test_the_core_does_not_import_the_extras():
    code = (  # torch itself imports tqdm where it is installed
        "import sys, torch; before = set(sys.modules); import ulmfit_fast.train, ulmfit_fast.cli; "
        "print({'tokenizers', 'safetensors', 'tqdm', 'matplotlib'} & (set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, cwd=pathlib.Path(__file__).parents[1]
    )
    assert done.stdout == "set()\n", done.stderr
