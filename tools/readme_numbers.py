"""Writes the tables of benchmarks/results into README.md, between their markers: `make readme`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import report  # noqa: E402
from benchmarks.quality_report import table  # noqa: E402
from benchmarks.record import RESULTS, load_all, write  # noqa: E402


def fill(text, name, content):
    """`text` with `content` between the markers of `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def main():
    readme, quality = ROOT / "README.md", load_all(RESULTS)
    speed = report.summary(report.write_report(RESULTS), folder="benchmarks/results/")
    text = fill(readme.read_text(encoding="utf-8"), "numbers", table(quality) if quality else report.NOTHING)
    write(readme, fill(text, "speed", speed).encode())


if __name__ == "__main__":
    main()
