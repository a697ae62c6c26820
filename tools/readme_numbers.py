"""Writes the tables of benchmarks/results into README.md and benchmarks/README.md: `make readme`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import fastai_classifier, report  # noqa: E402
from benchmarks.headline import elsewhere, headline  # noqa: E402
from benchmarks.quality_report import table  # noqa: E402
from benchmarks.record import RESULTS, load_all, write  # noqa: E402


def blocks():
    """{page: {name of its markers: what belongs between them}}"""
    speed, quality = load_all(RESULTS, "speed"), load_all(RESULTS)
    return {
        "README.md": {"headline": headline(speed)},
        "benchmarks/README.md": {
            "machines": elsewhere(speed),
            "numbers": table(quality) if quality else report.NOTHING,
            "pipeline": "\n\n".join(map(fastai_classifier.table, load_all(RESULTS, "fastai-classifier"))),
            "speed": report.summary(speed, folder="results/"),
        },
    }


def fill(text, name, content):
    """`text` with `content` between the markers of `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def filled(page, contents):
    """The text of a page with all of its blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, content in contents.items():
        text = fill(text, name, content)
    return text


def main():
    report.write_report(RESULTS)
    for page, contents in blocks().items():
        write(ROOT / page, filled(page, contents).encode())


if __name__ == "__main__":
    main()
