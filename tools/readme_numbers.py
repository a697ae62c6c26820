"""Writes the table of benchmarks/results into README.md, between its two markers: `make readme`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.quality_report import table  # noqa: E402
from benchmarks.record import load_all  # noqa: E402

BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"


def main():
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    records = load_all(ROOT / "benchmarks" / "results")
    numbers = table(records).strip() if records else "Not measured yet."
    readme.write_text(f"{before}{BEGIN}\n{numbers}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
