"""Labels and validation sets that are wrong: the message names the argument and its value."""

import pathlib

import pytest

from ulmfit_fast.corpus import check_known, check_labels, read_labelled, read_texts, read_valid

pytestmark = pytest.mark.cpu_only("text is read on the host")
MISSING = float("nan")


class Table:
    columns = ("text", "label")


class NAType:  # as pandas.NA, whose comparisons have no truth value
    def __ne__(self, other):
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = None


@pytest.mark.parametrize(
    "labels", [[0, None, 1], ["a", None], [0, MISSING], [0.0, MISSING], ["a", MISSING], [1, NAType()]]
)
def test_a_missing_label_is_named(labels):
    with pytest.raises(ValueError, match=r"labels\[1\] is missing: .*; leave out its text"):
        check_labels(labels)


def test_a_label_of_another_type_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"all str or all int, got 'a' \(str\) in labels\[2\]"):
        check_labels([0, 1, "a"])
    assert check_labels([0, 2, 7]) == [0, 2, 7]


def test_a_message_lists_few_of_many_classes():
    with pytest.raises(ValueError, match="valid has the label -1, .*: 0, 1, 2, 3, 4, 5 and 4994 more$"):
        check_known([3, -1], list(range(5000)), "valid")


def test_a_message_lists_few_of_many_columns(tmp_path):
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(900)) + "\n")
    with pytest.raises(ValueError, match=r"no column 'text'; .* \['c0', .* and 894 more\]$"):
        read_texts(tmp_path / "wide.csv")


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        ("no.csv", FileNotFoundError, "valid: no such file: 'no.csv'"),
        (pathlib.Path("no.tsv"), FileNotFoundError, "valid: no such file: 'no.tsv'"),
        (("no.txt", ["a"]), FileNotFoundError, "valid: no such file: 'no.txt'"),
        ("no.txt", ValueError, "valid='no.txt' has no labels: give a CSV"),
        (3, TypeError, r"valid must be \(texts, labels\), or the path of a CSV .*, got int: 3$"),
        ("a text", TypeError, "valid must be .* CSV .*, got str: 'a text'$"),
        (["a", "b", "c"], TypeError, "valid must be .* CSV .*, got a list of 3$"),
        (Table(), TypeError, r"valid must be .*, got a Table: give .*\(df\['text'\], df\['label'\]\)$"),
        ((Table(), ["a"]), TypeError, r"valid\[0\] must be a list of texts, got a Table: give one column"),
        ((["a"], 3), TypeError, r"valid\[1\] must be a list of labels, one per text, got int: 3"),
        ((["a"], [None]), ValueError, r"valid\[1\]\[0\] is missing: None"),
    ],
)
def test_a_classifiers_valid_is_named(valid, error, message):
    with pytest.raises(error, match=message):
        read_valid(valid, ["a", "b"])


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        ("no.txt", FileNotFoundError, "valid: no such file: 'no.txt'"),
        (["a", "no.csv"], FileNotFoundError, "valid: no such file: 'no.csv'"),
        (3, TypeError, "valid must be a list of texts or paths, or the path of a file, got int: 3"),
        (Table(), TypeError, r"valid must be .*, got a Table: give one column of it, .* df\['text'\]"),
    ],
)
def test_a_language_models_valid_is_named(valid, error, message):
    with pytest.raises(error, match=message):
        read_texts(valid, "valid")


def test_texts_of_a_file_that_is_missing_are_named():
    with pytest.raises(FileNotFoundError, match="texts: no such file: 'no.csv'"):
        read_labelled("no.csv")
