"""Reading text: lists, text files and CSV, with errors that name the file and the place."""

import contextlib
import csv
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeGuard

from .checkpoints import listed
from .text import as_list, check_texts

Sources = str | pathlib.Path | Iterable[str | pathlib.Path]
Label = str | int
Labels = Iterable[Label]  # all str or all int

TABLES = (".csv", ".tsv")
SUFFIXES = (".txt", *TABLES)
# what would otherwise be read as lines of text, or be taken for text in a wrong encoding
UNREADABLE = (".gz", ".bz2", ".xz", ".zst", ".zip", ".json", ".jsonl", ".parquet", ".xlsx")


def is_path(source: object) -> TypeGuard[str | pathlib.Path]:
    """Whether `source`, given alone, is a file: a pathlib.Path, a str that ends in .txt, .csv or .tsv, or one
    that is the name of a file.
    """
    if isinstance(source, pathlib.Path):
        return True
    return isinstance(source, str) and (_has_suffix(source) or os.path.isfile(source))


def _has_suffix(source: str) -> bool:
    return len(source) <= 4096 and "\n" not in source and source.lower().endswith(SUFFIXES)


def _listed_path(source: object, where: str) -> bool:
    """Whether `source`, an entry of a list, is a file: a pathlib.Path, or a str that ends in .txt, .csv or
    .tsv and either exists or is a single word.

    ValueError for another str that is the name of a file, or of one that is missing in a folder that exists,
    or the path of a folder: nobody can tell whether it is meant as a text.
    """
    if not isinstance(source, str):
        return isinstance(source, pathlib.Path)
    exists = os.path.isfile(source)
    if _has_suffix(source):
        if exists or len(source.split()) == 1:
            return True
        if not os.path.isdir(os.path.dirname(source)):  # a sentence that ends in a name or an address
            return False
    elif "/" in source and len(source) <= 4096 and os.path.isdir(source):
        raise ValueError(f"{where}={source!r} is a folder: give the files in it")
    elif not exists:
        return False
    raise ValueError(
        f"{where}={source!r} {'is a file' if exists else 'looks like a path, but is no file'}: give "
        "pathlib.Path(...) to read it; a text of these words needs a space at its end"
    )


def read_texts(sources: Sources, argument: str = "texts") -> list[str]:
    """Texts of `sources`: one path, or a list of texts and paths in any mixture.

    A str in the list is a text, but one that ends in .txt, .csv or .tsv, and exists or is a single word, is a
    path. A str that might be either is refused.

    A text file gives one text a line (lines that are empty are left out), so a line that ends a paragraph or
    a sentence is a text of its own, beginning with xxbos; the stream keeps their order. A CSV (or TSV) gives
    one text a row, of its column `text`.
    """
    if is_path(sources):
        given, found = [sources], [True]
    else:
        given = as_list(sources, argument, "texts or paths, or the path of a file")
        found = [_listed_path(source, f"{argument}[{i}]") for i, source in enumerate(given)]
    texts: list[Any] = []
    for source, is_file in zip(given, found, strict=True):
        if not is_file:
            texts.append(source)
        elif str(source).lower().endswith(TABLES):
            texts += [row["text"] for row in _read_csv(source, ["text"], argument)]
        else:
            texts += [line for line in map(str.strip, read_lines(source, argument)) if line]
    if not texts:
        what = f"{len(given)} files without a line of text" if given else "no text"
        raise ValueError(f"{argument} is empty: {what}")
    return check_texts(texts, argument)


def read_labelled(
    texts: str | pathlib.Path | Iterable[str], labels: Labels | None = None, argument: str = "texts"
) -> tuple[list[str], list[Label]]:
    """(texts, labels): two lists, or a CSV with the columns `text` and `label` and no `labels`.

    With `labels` every entry of a list is a text, whatever it looks like.
    """
    if labels is None:
        if not is_path(texts):
            raise TypeError(
                f"labels is missing: give one label per text, or let {argument} be the path of a CSV "
                "with the columns text and label"
            )
        if not str(texts).lower().endswith(TABLES):
            raise ValueError(
                f"{argument}={str(texts)!r} has no labels: give a CSV with the columns text and label"
            )
        rows = _read_csv(texts, ["text", "label"], argument)
        texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    elif is_path(texts):
        texts = read_texts(texts, argument)
    names = (argument, "labels") if argument == "texts" else (f"{argument}[0]", f"{argument}[1]")
    checked, known = check_texts(texts, names[0]), check_labels(labels, names[1])
    check_one_length(checked, known, *names)
    return checked, known


def read_valid(valid: object, classes: list[Any]) -> tuple[list[str], list[Label]]:
    """(texts, labels) of a classifier's validation set: of that pair, or of a CSV."""
    # a str as the second of two is another text, and labels are missing
    if isinstance(valid, (tuple, list)) and len(valid) == 2 and not isinstance(valid[1], (str, os.PathLike)):
        texts, labels = read_labelled(valid[0], valid[1], "valid")
    elif is_path(valid):
        texts, labels = read_labelled(valid, None, "valid")
    else:
        got = f"{type(valid).__name__}: {valid!r:.60}"
        if isinstance(valid, (tuple, list)):
            got = f"a {type(valid).__name__} of {len(valid)}"
        elif hasattr(valid, "columns"):
            got = f"a {type(valid).__name__}: give two columns of it, for example (df['text'], df['label'])"
        raise TypeError(
            "valid must be (texts, labels), or the path of a CSV or TSV with the columns text and label, got "
            f"{got}"
        )
    check_known(labels, classes, "valid")
    return texts, labels


def check_one_length(
    texts: list[str], labels: list[Label], name: str = "texts", of_labels: str = "labels"
) -> None:
    if len(texts) != len(labels):
        raise ValueError(
            f"{name} and {of_labels} must have one length, got {len(texts)} texts and {len(labels)} labels"
        )


def check_labels(labels: Labels, argument: str = "labels") -> list[Label]:
    """Labels as a list of str or of int (numpy scalars and tensors become Python's)."""
    given = as_list(labels, argument, "labels, one per text")
    for i, label in enumerate(given):
        shape = tuple(getattr(label, "shape", ()))
        if math.prod(shape) != 1:
            raise TypeError(
                f"{argument}[{i}] must be one label, got an array of shape {shape}; of one-hot rows, "
                "labels.argmax(1) gives the labels"
            )
    checked = [x.item() if hasattr(x, "item") else x for x in given]
    for i, label in enumerate(checked):
        # also pandas' NA and NaT, which make a column of int one of float
        if label is None or type(label).__name__ in ("NAType", "NaTType") or label != label:
            raise ValueError(
                f"{argument}[{i}] is missing: {label!r}; leave out its text, or give it a label of its own"
            )
    kinds = {type(x) for x in checked}
    if kinds and (len(kinds) > 1 or not kinds <= {str, int, bool}):
        i, odd = next(
            (i, x)
            for i, x in enumerate(checked)
            if type(x) is not type(checked[0]) or type(x) not in (str, int, bool)
        )
        got = f"{odd!r:.60} ({type(odd).__name__}) in {argument}[{i}]"
        raise TypeError(f"{argument} must be all str or all int, got {got}")
    blank = next((i for i, x in enumerate(checked) if isinstance(x, str) and not x.strip()), None)
    if blank is not None:
        raise ValueError(f"{argument}[{blank}] is blank: {checked[blank]!r}")
    return checked


def check_known(labels: list[Label], classes: list[Any], argument: str = "labels") -> None:
    """ValueError for a label that is not one of `classes`, the classes of training."""
    known = set(classes)
    for label in labels:
        if label not in known:
            some = listed(map(repr, classes))
            raise ValueError(f"{argument} has the label {label!r}, which the training labels lack: {some}")


def label_classes(labels: list[Any]) -> list[Label]:
    """The classes in order; fewer than two are refused."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(classes)}: {classes!r}")
    return classes


@contextlib.contextmanager
def _opened(path: str | pathlib.Path, argument: str = "") -> Iterator[TextIO]:
    """A text file to iterate over, line ends as \\n, without a byte order mark."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{f'{argument}: ' if argument else ''}no such file: {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name the files in it")
    if path.suffix.lower() in UNREADABLE:
        raise ValueError(
            f"{str(path)!r}: a {path.suffix} file is not read; give an unpacked text file (one text a line), "
            "a CSV with a column text, or a list of texts"
        )
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError:
            raise ValueError(
                f"{str(path)!r} is not UTF-8{_first_wrong_byte(path)}; convert it first, for example with "
                "iconv -t UTF-8"
            ) from None


def _first_wrong_byte(path: pathlib.Path) -> str:
    if not path.is_file():  # a pipe: what was read is gone
        return ""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f": byte 0x{data[error.start]:02x} at offset {error.start}"
    return ""  # a byte order mark that is cut short, or a file that has changed


def read_lines(path: str | pathlib.Path, argument: str = "") -> list[str]:
    """All lines of a text file, the empty ones too."""
    with _opened(path, argument) as file:
        return [line.removesuffix("\n") for line in file]


def split_lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def _read_csv(path: str | pathlib.Path, columns: list[str], argument: str) -> list[dict[str, str]]:
    """The rows as dicts; every row has all of `columns`, and a label is never blank."""
    limit = csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # a document may be longer than the module's 128 KB
    try:
        with _opened(path, argument) as file:
            records = list(_records(file, path))
    finally:
        csv.field_size_limit(limit)
    names = records[0][1] if records else []
    for column in columns:
        if names.count(column) != 1:
            raise ValueError(
                f"{str(path)!r} has {'more than one' if column in names else 'no'} column {column!r}; its "
                f"first line gives the columns [{listed(map(repr, names))}]"
            )
    if len(records) < 2:
        raise ValueError(f"{str(path)!r} has no rows under its heading")
    return [_row(where, names, fields, columns) for where, fields in records[1:]]


def _records(file: TextIO, path: str | pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of the heading and of each row. A TSV has no quoting: its quotation marks are text."""
    tsv = str(path).lower().endswith(".tsv")
    form: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else {}
    reader = csv.reader(file, strict=True, **form)
    while True:
        where = f"{str(path)!r}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{where}: the row that begins here cannot be read: {error}; a text in quotes ends with a "
                "quotation mark, and one inside it is doubled"
            ) from None
        if fields is None:
            return
        if fields:
            yield where, fields


def _row(where: str, names: list[str], fields: list[str], columns: list[str]) -> dict[str, str]:
    if len(fields) > len(names):
        raise ValueError(
            f"{where}: {len(fields)} fields under {len(names)} columns; quote CSV fields that contain commas"
        )
    row = dict(zip(names, fields, strict=False))
    for column in columns:
        if column not in row:
            raise ValueError(
                f"{where}: the column {column!r} is missing; in a TSV, which has no quoting, a text is a line"
            )
    if "label" in columns:
        row["label"] = row["label"].strip()
        if not row["label"]:
            raise ValueError(f"{where}: the label is blank")
    return row
