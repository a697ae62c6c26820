"""Reading text: lists, text files and CSV, with errors that name the file and the place."""

import csv
import io
import os
import pathlib
import sys

from .text import check_texts

SUFFIXES = (".txt", ".csv", ".tsv")


def is_path(source):
    """A pathlib.Path is a file. So is a str that ends in .txt, .csv or .tsv and either exists or has no
    white space.
    """
    if isinstance(source, pathlib.Path):
        return True
    if not isinstance(source, str) or not source.lower().endswith(SUFFIXES) or len(source) > 4096:
        return False
    return len(source.split()) == 1 or os.path.exists(source)


def read_texts(sources, argument="texts"):
    """Texts of `sources`: one path, or a list of texts and paths in any mixture.

    A text file gives one text a line (lines that are empty are left out), so a line that ends a paragraph or
    a sentence is a text of its own, beginning with xxbos; the stream keeps their order. A CSV (or TSV) gives
    one text a row, of its column `text`.
    """
    if is_path(sources):
        sources = [sources]
    elif isinstance(sources, str):
        raise TypeError(
            f"{argument} must be a list of texts or the path of a .txt or .csv file, got {sources[:60]!r}"
        )
    try:
        sources = list(sources)
    except TypeError:
        raise TypeError(
            f"{argument} must be a list of texts or paths, got {type(sources).__name__}"
        ) from None
    texts = []
    for source in sources:
        if not is_path(source):
            texts.append(source)
        elif str(source).lower().endswith((".csv", ".tsv")):
            texts += [row["text"] for row in _read_csv(source, ["text"])]
        else:
            texts += [line for line in map(str.strip, _read(source).split("\n")) if line]
    if not texts:
        what = f"{len(sources)} files without a line of text" if sources else "nothing"
        raise ValueError(f"{argument} is empty: {what} to train on")
    return check_texts(texts, argument)


def read_labelled(texts, labels=None, argument="texts"):
    """(texts, labels): two lists, or a CSV with the columns `text` and `label` and no `labels`."""
    if labels is None:
        if not is_path(texts):
            raise TypeError(
                f"labels is missing: give one label per text, or let {argument} be the path of a CSV "
                "with the columns text and label"
            )
        if not str(texts).lower().endswith((".csv", ".tsv")):
            raise ValueError(
                f"{argument}={str(texts)!r} has no labels: give a CSV with the columns text and label"
            )
        rows = _read_csv(texts, ["text", "label"])
        texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    else:
        texts = read_texts(texts, argument)
    texts, labels = check_texts(texts, argument), check_labels(labels)
    if len(texts) != len(labels):
        raise ValueError(
            f"{argument} and labels must have one length, got {len(texts)} texts and {len(labels)} labels"
        )
    return texts, labels


def check_labels(labels, argument="labels"):
    """Labels as a list of str or of int (numpy scalars and tensors become Python's)."""
    if isinstance(labels, str):
        raise TypeError(f"{argument} must be a list with one label per text, got one str: {labels[:40]!r}")
    try:
        labels = [x.item() if hasattr(x, "item") else x for x in labels]
    except TypeError:
        raise TypeError(
            f"{argument} must be a list with one label per text, got {type(labels).__name__}"
        ) from None
    kinds = {type(x) for x in labels}
    if kinds and (len(kinds) > 1 or not kinds <= {str, int, bool}):
        odd = next(x for x in labels if type(x) is not type(labels[0]) or type(x) not in (str, int, bool))
        raise TypeError(
            f"{argument} must be all str or all int, got {odd!r} ({type(odd).__name__}) among them"
        )
    return labels


def label_classes(labels):
    """The classes in order; fewer than two are refused."""
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(classes)}: {classes!r}")
    return classes


def _read(path):
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name the files in it")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first, for example with iconv -t UTF-8"
        ) from None


def _read_csv(path, columns):
    text = _read(path)
    limit = csv.field_size_limit(
        min(sys.maxsize, 2**31 - 1)
    )  # a document may be longer than the module's 128 KB
    try:
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if str(path).lower().endswith(".tsv") else ","
        )
        names = reader.fieldnames or []
        for column in columns:
            if column not in names:
                raise ValueError(
                    f"{str(path)!r} has no column {column!r}; its first line gives the columns {names}"
                )
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is not a readable CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, 2):
        for column in columns:
            if row[column] is None:
                raise ValueError(f"{str(path)!r}, row {number}: the column {column!r} is missing")
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows under its heading")
    return rows
