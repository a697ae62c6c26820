"""Which speed records stand for which machine, what files and headings call it, and what README.md shows."""

import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import harness, headline, machine, report, selection  # noqa: E402
from benchmarks.record import checked_out, commit_time  # noqa: E402

pytestmark = pytest.mark.cpu_only("records are of any machine")


def step_record(benchmark="train_step-lm", **changes):
    """A made-up record of a training step: ours in 2 ms, torch in 5 ms."""
    sides = {
        f"{library} {precision}": {
            "library": library,
            "precision": precision,
            "total_ms": {"median": ms, "samples": [ms]},
            "peak_mb": ms,
        }
        for library, ms in (("ours", 2.0), ("torch", 5.0))
        for precision in ("fp32", "bf16")
    }
    place = {"isa": "avx2", "device": "a processor (family 6)", "threads": 2, "commit": "none"}
    place |= {"date": "2000-01-01", "load_average_1min": 0.5, "versions": {"torch": "2"}, "roof": {}}
    made_up = {"benchmark": benchmark, "preset": "ulmfit", "batch": 64, "bptt": 72, "vocab": 30000}
    return made_up | place | {"quick": False, "cases": {"step": {"shapes": {}, "sides": sides}}} | changes


@pytest.mark.parametrize("error, shown", [(0.01, False), (0.5, True)])
def test_torchs_slow_path_is_shown_where_the_other_is_wrong(error, shown):
    record = step_record("lstm")
    sides = record["cases"]["step"]["sides"]
    sides["torch bf16"]["gradient_error"] = error
    sides["torch bf16 without oneDNN"] = {**sides["torch bf16"], "gradient_error": 0.01}
    names = [names for *_, names in selection.main_pairs(record)]
    assert (("ours bf16", "torch bf16 without oneDNN") in names) == shown
    assert ("ours bf16", "torch bf16") in names and ("ours fp32", "torch fp32") in names
    assert ("torch bf16 without oneDNN" in report.summary([record])) == shown
    assert "torch bf16 without oneDNN" in report.ratio_table([record])


def test_the_machine_measured_last_comes_first(monkeypatch):
    """By date, and within a day by the commit's time; records of commits that timed single calls say so."""
    times = {"old": selection.TWO_CALLS_SINCE - 1, "new": selection.TWO_CALLS_SINCE}
    monkeypatch.setattr("benchmarks.record.commit_time", lambda commit: times.get(commit, 0))
    old = step_record(commit="old with local changes", isa="amx", device="an old one")
    new, today = step_record(commit="new"), step_record(date="2000-01-02", isa="avx512", device="of today")
    assert list(selection.machines([old, new])) == ["a-6-avx2", "an-old-one-amx"]
    assert list(selection.machines([old, new, today])) == ["of-today-avx512", "a-6-avx2", "an-old-one-amx"]
    newer, older = report.summary([old, new]).split("### an old one, amx, older records")
    assert report.OLD_NOTE in older and report.OLD_NOTE not in newer
    assert "### a processor (family 6), avx2" in newer
    table = headline.headline([old, new])
    assert (
        "| language model | fp32 | 2 ms | 5 ms, **2.50×** (2.50-2.50) | not measured | 2, 5, - MB |" in table
    )
    assert "an old one" not in table and headline.OLD not in table
    assert headline.OLD in headline.headline([old])
    assert "an old one" not in headline.elsewhere([today, new, old])
    assert headline.headline([step_record(quick=True)]) == headline.headline([]) == report.NOTHING
    assert headline.elsewhere([]) == ""


NAMES = {
    "AMD EPYC (family 26, model 2)": "amd-epyc-26-2-avx2",
    "AMD EPYC 9654 96-Core Processor (family 25, model 17)": "amd-epyc-9654-96-core-25-17-avx2",
    "Intel(R) Xeon(R) Processor (family 6, model 167)": "intel-xeon-6-167-avx2",
    "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 79)": "intel-xeon-2-20ghz-6-79-avx2",
    "Intel(R) Core(TM) i7-13700K (family 6, model 183)": "intel-core-i7-13700k-6-183-avx2",
    "aarch64 (implementer 0x41, part 0xd40)": "aarch64-0x41-0xd40-avx2",
    "arm": "arm-avx2",
}


def test_names_of_processors():
    assert {name: machine.short_name({"device": name, "isa": "avx2"}) for name in NAMES} == NAMES
    x86 = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
    assert machine.cpu_name_of(x86) == "AMD EPYC (family 26, model 2)"
    arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"
    assert machine.cpu_name_of(arm) == f"{platform.machine()} (implementer 0x41, part 0xd40)"
    assert machine.cpu_name_of("") == platform.machine()


def test_processors_of_one_instruction_set_do_not_mix():
    zen4, zen5, unknown = (
        [step_record(device=f"AMD EPYC (family {numbers})", date=f"2000-01-0{day}")]
        for day, numbers in enumerate(("25, model 17", "26, model 2", "25, model 171"), 1)
    )
    for name in ("train_step-classifier", "lstm"):
        zen4.append(zen4[0] | {"benchmark": name})
    names = [harness.file_name("speed", {"preset": "tiny", "batch": 3}, r[0]) for r in (zen4, zen5)]
    assert names[0] == "speed-tiny-batch3-amd-epyc-25-17-avx2-threads2.json" != names[1]
    found = selection.machines([*zen4, *zen5, *unknown])
    assert list(found.values()) == [unknown, zen5, zen4]
    again = zen4[0] | {"date": "2000-01-04"}  # measured once more: first, and still one machine
    assert list(selection.machines([*zen5, *zen4[1:], again])) == [list(found)[2], list(found)[1]]
    headings = [line for line in report.summary([*zen4, *zen5, *unknown]).splitlines() if line[:3] == "###"]
    processors = ("family 25, model 171", "family 26, model 2, Zen 5", "family 25, model 17, Zen 4")
    assert headings == [f"### AMD EPYC ({processor}), avx2" for processor in processors]


def test_the_headline_has_a_row_for_every_other_machine():
    first, other = step_record(date="2000-01-02"), step_record(device="another", threads=1)
    sides = other["cases"]["step"]["sides"]
    sides["torch bf16"]["gradient_error"] = 1.0
    classifier = step_record("train_step-classifier", device="another")
    shown = headline.elsewhere([first, other, classifier])
    # steps of sizes that the first machine has not, and what was measured in a hurry, do not compare
    assert "| another, avx2, 1 thread | **2.50×** | wrong gradients | - | - |" in shown
    assert "another, avx2, 2 threads" not in shown
    assert shown == headline.elsewhere([first, other, classifier, step_record(device="a third", batch=16)])
    assert headline.elsewhere([first, step_record(device="another", quick=True)]) == ""
    alone = headline.headline([first, other, classifier])
    assert "another" not in alone and alone.count("Measured on a processor (family 6)") == 1


def test_the_headline_is_of_a_machine_where_torch_has_every_precision():
    last, before = step_record(device="no bf16", date="2000-01-03"), step_record(date="2000-01-02")
    del last["cases"]["step"]["sides"]["torch bf16"]
    shown = headline.headline([last, before])
    assert "Measured on a processor (family 6)" in shown
    assert "| no bf16, avx2, 2 threads | **2.50×** | - |" in headline.elsewhere([last, before])
    assert "Measured on no bf16" in headline.headline([last])
    del last["cases"]["step"]["sides"]["ours bf16"]  # nor did anybody ask for ours
    assert headline.headline([last, before]) == shown


def test_a_peer_whose_gradients_are_wrong_is_no_peer():
    """The language model's step tells; the classifier's, which has the same LSTM, is not compared itself."""
    lm, classifier = step_record(), step_record("train_step-classifier")
    for name, side in lm["cases"]["step"]["sides"].items():
        side["gradient_error"] = 1.0 if name == "torch bf16" else 1e-6
    rows = report.summary([lm, classifier]).splitlines()
    marked = [row for row in rows if report.WRONG_NOTE in row]
    assert len(marked) == 2 and all("ours bf16 | torch bf16" in row and "**" not in row for row in marked)
    assert headline.headline([lm, classifier]).count("5 ms, wrong gradients") == 2
    classifier["cases"]["step"]["sides"]["torch bf16"]["gradient_error"] = 1e-2
    assert report.summary([lm, classifier]).count(report.WRONG_NOTE) == 1


def test_age_of_a_commit():
    known = commit_time("HEAD")
    assert known == 0 or known > selection.TWO_CALLS_SINCE  # 0: no git here
    assert commit_time("0" * 40) == 0


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_measured_again_is_no_local_change(tmp_path):
    code, record = tmp_path / "code.py", tmp_path / "results" / "record.json"
    record.parent.mkdir()
    for file in (code, record):
        file.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    record.write_text("2")
    commit = checked_out(record.parent)
    assert len(commit) == 40
    code.write_text("2")
    assert checked_out(record.parent) == commit + " with local changes"


def test_main_record_is_that_of_the_largest_preset_measured_with_care():
    def record(**changes):
        base = {"benchmark": "lstm", "quick": False, "preset": "ulmfit", "batch": 64, "threads": 1}
        return base | changes

    records = [
        record(threads=2),
        record(threads=2, quick=True),
        record(),
        record(batch=128),
        record(preset="small"),
        record(preset="1024x1024", threads=2),
    ]
    assert report.main_records(records) == [records[0]]
