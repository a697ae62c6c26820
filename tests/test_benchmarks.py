"""The speed programs run, say where they were measured, and their report shows it. Nothing asserts a time."""

import functools
import json
import operator
import os
import pathlib
import platform
import subprocess
import sys
import types

import pytest
import torch

import ulmfit_fast as uf

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import arguments, clocks, harness, machine, memory, report, roof, steps  # noqa: E402
from benchmarks.harness import Side  # noqa: E402

pytestmark = pytest.mark.cpu_only("the programs measure the CPU")
TINY = ["--quick", "--preset", "tiny", "--batch", "3", "--bptt", "5", "--threads", "1"]
ALL = ["--precision", "fp32", "high", "bf16"]
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
        done = run(program, *TINY, *ALL, *options, "--results", str(folder))
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
    done = run("profile_ops", *TINY, *ALL, "--vocab", "50", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.iterdir()).read_text())
    peers = {"torch fp32", "torch bf16"} if roof.torch_has(torch.bfloat16) else {"torch fp32"}
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
    name = machine.short_name({"device": machine.cpu_name(), "isa": uf.info().isa})
    picture = results / f"speed-{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = (results / "speed.md").read_text()
    for benchmark, title in report.TITLES.items():
        assert (f"## {title}: tiny, batch 3, bptt 5" in text) == (benchmark != "graph_step")
    assert "NVIDIA" not in text and list(results.glob("*.png")) == [picture]
    for shown in ("torch bf16 without oneDNN", "embedding_dropout", "all layers", "tokens/s", "--quick"):
        assert shown in text
    assert not list(results.glob("*.part"))


@pytest.mark.parametrize(
    "isa, precisions",
    [("amx", ["fp32", "high", "bf16"]), ("avx512bf16", ["fp32", "bf16"]), ("avx2", ["fp32"])],
)
def test_default_precisions_are_those_with_kernels_of_their_own(isa, precisions, monkeypatch):
    monkeypatch.setattr(uf, "info", lambda: types.SimpleNamespace(isa=isa))
    parser = arguments.options("About.", on_gpu=("fp16",))
    assert arguments.parse(parser, []).precision == precisions
    assert arguments.parse(parser, ["--precision", "bf16", "high"]).precision == ["bf16", "high"]


def test_report_without_records(tmp_path):
    assert report.summary([]) == "Not measured yet."
    assert report.write_report(tmp_path) == []
    assert "Not measured yet." in (tmp_path / "speed.md").read_text()


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


@pytest.mark.parametrize("program", ["lstm", "linear_cross_entropy", "dropout_mask"])
def test_other_precisions_of_single_ops(program, tmp_path):
    done = run(program, *TINY, "--precision", "fp16", "fp64", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "ours fp64 against torch" in done.stdout
    for case in json.loads(next(tmp_path.iterdir()).read_text())["cases"].values():
        assert {"ours fp16", "ours fp64"} < set(case["sides"])


def test_precisions_that_a_step_has_not():
    done = run("train_step", "--precision", "fp64")
    assert done.returncode == 2 and "invalid choice: 'fp64'" in done.stderr


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
