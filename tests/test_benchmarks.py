"""The speed programs run, say where they were measured, and their report shows it. Nothing asserts a time."""

import functools
import json
import operator
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch

import ulmfit_fast as uf

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import clocks, harness, headline, memory, report, roof, selection, steps  # noqa: E402
from benchmarks.harness import Side  # noqa: E402
from benchmarks.record import commit_time  # noqa: E402

pytestmark = pytest.mark.cpu_only("the programs measure the CPU")
TINY = ["--quick", "--preset", "tiny", "--batch", "3", "--bptt", "5", "--threads", "1"]
PROGRAMS = {
    "lstm": ["--slow-peers"],
    "linear_cross_entropy": ["--vocab", "50"],
    "dropout_mask": ["--vocab", "50"],
    "train_step": ["--vocab", "50", "--slow-peers"],
    "way_back": ["--vocab", "50"],
}
CASE = dict(preset="tiny", batch=3, bptt=5, vocab=50)


def run(program, *options, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    command = [sys.executable, "-m", f"benchmarks.{program}", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder that all programs wrote into."""
    folder = tmp_path_factory.mktemp("results")
    for program, options in PROGRAMS.items():
        done = run(program, *TINY, *options, "--results", str(folder))
        assert done.returncode == 0, done.stderr
    return folder


def test_records_say_where_and_what(results):
    records = [json.loads(path.read_text()) for path in sorted(results.glob("speed-*.json"))]
    assert {r["benchmark"] for r in records} == set(report.TITLES) - {"graph_step"}
    for record in records:
        assert record["isa"] and record["device"] and record["versions"]["torch"] == torch.__version__
        assert record["command"].startswith("python -m benchmarks.") and str(results) not in record["command"]
        assert {"commit", "date", "load_average_1min"} <= set(record)
        assert "gpu" not in record
        assert (record["threads"], record["preset"], record["batch"], record["bptt"]) == (1, "tiny", 3, 5)
        assert set(record["dtype"]) == {"float32", "bfloat16"}
        assert record["roof"]["fp32_gflops"] > 0 and record["roof"]["copy_gb_s"] > 0
        for case in record["cases"].values():
            assert case["shapes"]
            assert {"ours fp32", "ours bf16"} <= set(case["sides"])
            for side in case["sides"].values():
                samples = side["total_ms"]["samples"]
                assert len(samples) in (1, 2) and min(samples) > 0
                assert min(samples) <= side["total_ms"]["median"] <= max(samples)


def test_profile_counts_what_our_ops_must_do(tmp_path):
    done = run("profile_ops", *TINY, "--vocab", "50", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.iterdir()).read_text())
    peers = {"torch fp32", "torch bf16"} if roof.torch_has_bf16() else {"torch fp32"}
    assert set(record["sides"]) == {"ours fp32", "ours high", "ours bf16", *peers}
    for name, side in record["sides"].items():
        ops = {row["op"]: row for row in side["top"]}
        assert sum(row["share"] for row in side["top"]) <= 1.001
        if name.startswith("ours"):
            assert ops["ulmfit_fast::lstm"]["flops"] * 2 == ops["ulmfit_fast::lstm_backward"]["flops"] > 0
            assert ops["ulmfit_fast::lstm"]["calls"] == 3  # layers


def test_errors_and_memory_are_recorded(results):
    for name in ("lstm", "linear_cross_entropy", "train_step-lm"):
        record = json.loads(next(results.glob(f"speed-{name}-*.json")).read_text())
        for case in record["cases"].values():
            for side in case["sides"].values():
                # not a test of torch's bf16: only a fault in the wiring is as large as this
                assert side["gradient_error"] < {"fp32": 1e-4, "high": 1e-3, "bf16": 0.2}[side["precision"]]
                assert name == "lstm" or "peak_mb" in side


def test_report_shows_every_benchmark(results):
    done = run("report", "--results", str(results))
    assert done.returncode == 0, done.stderr
    picture = results / f"speed-{uf.info().isa}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (results / "speed.md").read_text()
    for benchmark, title in report.TITLES.items():
        assert (f"## {title}: tiny, batch 3, bptt 5" in text) == (benchmark != "graph_step")
    assert "NVIDIA" not in text and list(results.glob("*.png")) == [picture]
    for shown in ("torch bf16 without oneDNN", "embedding_dropout", "all layers", "tokens/s", "--quick"):
        assert shown in text
    assert not list(results.glob("*.part"))


def test_report_without_records(tmp_path):
    assert report.summary([]) == "Not measured yet."
    assert report.write_report(tmp_path) == []
    assert "Not measured yet." in (tmp_path / "speed.md").read_text()


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
    old = step_record(commit="old with local changes", isa="amx", device="an older one")
    new, today = step_record(commit="new"), step_record(date="2000-01-02", isa="avx512", device="today's")
    assert list(selection.machines([old, new])) == ["avx2", "amx"]
    assert list(selection.machines([old, new, today])) == ["avx512", "avx2", "amx"]
    newer, older = report.summary([old, new]).split("### an older one, amx, older records")
    assert report.OLD_NOTE in older and report.OLD_NOTE not in newer and "### a processor, avx2" in newer
    table = headline.headline([old, new], folder="pictures/")
    assert (
        "| language model | fp32 | 2 ms | 5 ms, **2.50×** (2.50-2.50) | not measured | 2, 5, - MB |" in table
    )
    assert "pictures/speed-avx2.png" in table and "an older one" not in table and headline.OLD not in table
    assert headline.OLD in headline.headline([old])
    assert headline.headline([step_record(quick=True)]) == headline.headline([]) == report.NOTHING


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


def test_layers_of_any_size(tmp_path):
    done = run("lstm", *TINY, "--layers", "3x5", "5x4", "--precision", "fp32", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("speed-lstm-3x5-5x4-*.json")
    cases = json.loads(path.read_text())["cases"]
    assert [(name, case["shapes"].get("H")) for name, case in cases.items()] == [
        ("3 -> 5", 5),
        ("5 -> 4", 4),
        ("all layers", None),
    ]


@pytest.mark.parametrize("program", ["lstm", "linear_cross_entropy"])
def test_where_torch_has_no_bf16_worth_timing_float32_is_the_peer(program, tmp_path):
    """As on a machine with AVX2 alone, where torch's bf16 takes minutes a call at ULMFiT's sizes."""
    if platform.machine() != "x86_64":
        pytest.skip("oneDNN's limit on the instruction set is x86's")
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = run(program, *TINY, "--precision", "bf16", "--results", str(tmp_path), **limits)
    assert done.returncode == 0, done.stderr
    assert "ours bf16 against torch fp32: x" in done.stdout
    for case in json.loads(next(tmp_path.iterdir()).read_text())["cases"].values():
        assert set(case["sides"]) == {"ours bf16", "torch fp32"}


@pytest.mark.parametrize(
    "option, value, allowed",
    [("--batch", "0", "an integer of at least 1"), ("--layers", "3x", "INPUTSxHIDDEN, such as 400x1152")],
)
def test_option_that_is_no_size_is_refused(option, value, allowed):
    done = run("lstm", option, value)
    assert done.returncode == 2
    assert f"argument {option}: must be {allowed}, got '{value}'" in done.stderr


def test_sides_take_turns_of_two_calls_the_second_counting():
    calls = []

    def side(library, onednn=True):
        return Side(library, "fp32", lambda mark: (0, calls.append(library) or len(calls)), onednn)

    samples = harness.interleave([side("a"), side("b"), side("slow", onednn=False)], repeats=2)
    assert calls == [*"aabb", "slow", "slow", *"bbaa"]
    assert samples == {"a fp32": [2, 10], "b fp32": [4, 8], "slow fp32 without oneDNN": [6]}


def test_of_short_calls_the_median_counts():
    """The first call, of 100 ms, does not; those after it are added up to 40 ms."""
    lengths = iter([0.1, 0.001, 0.002, 0.018, 0.003, 0.02, 9.0])
    assert clocks.WallClock().sample(lambda mark: (0, next(lengths))) == 0.003
    lengths = iter([0.1, 0.0625, 9.0])
    assert clocks.WallClock().sample(lambda mark: (0, 0.001, next(lengths))) == (0.001, 0.0625)
    assert clocks.WallClock().sample(lambda mark: (0, 0)) == 0  # and ends


def test_settings_of_a_side_end_with_it():
    seen = []
    side = Side("ours", "high", lambda: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    with side.settings():
        side.run()
    assert seen == ["high"] and torch.get_float32_matmul_precision() == before


def test_peak_memory_sees_what_a_call_holds():
    build = functools.partial(functools.partial, operator.mul, b"x")
    peak = memory.peak(build, 1, 64 << 20, threads=1)
    assert peak is None or 63 < peak < 72


def test_ratio_pairs_rounds():
    ours, peer = ({"total_ms": {"samples": s}} for s in ([1, 2, 4], [2, 6, 8, 100]))
    assert harness.ratio(ours, peer)[1] == 2


@pytest.mark.parametrize("library", ["torch", "fastai"])
def test_peers_of_the_classifier_have_our_numbers(library):
    """Without dropout and with the same weights, documents of mixed lengths give the same loss and logits."""
    if library == "fastai":
        pytest.importorskip("fastai")
    case = steps.Case("classifier", **CASE)
    assert len(set(case.lengths)) == case.batch and max(case.lengths) > case.bptt
    ours, peer = (steps.build(case, name, dropout=False) for name in ("ours", library))
    for step in (ours, peer):
        step.model.train()
    torch.testing.assert_close(peer.loss().item(), ours.loss().item(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["torch", "fastai"])
def test_peers_of_the_language_model_have_our_numbers(library):
    if library == "fastai":
        pytest.importorskip("fastai")
    case = steps.Case("lm", **CASE)
    ours, peer = (steps.build(case, name, dropout=False) for name in ("ours", library))
    for _ in range(2):  # the second goes on from the first one's state
        torch.testing.assert_close(peer.loss().item(), ours.loss().item(), rtol=1e-4, atol=1e-5)
