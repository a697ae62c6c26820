"""What the speed programs and `on_gpu` do on a GPU, as far as that shows without one."""

import argparse
import json
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import (  # noqa: E402
    clocks,
    dropout_mask,
    floors,
    gpu,
    graph_step,
    harness,
    linear_cross_entropy,
    lstm,
    lstm_parts,
    machine,
    on_gpu,
    profile_step,
    report,
    steps,
    train_step,
)
from benchmarks.harness import Side  # noqa: E402

CASE = steps.Case("lm", preset="tiny", batch=3, bptt=5, vocab=50)
PROGRAMS = dropout_mask, graph_step, linear_cross_entropy, lstm, lstm_parts, profile_step, train_step


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(program, *options): what it says on standard error when it exits with 2."""

    def refuse(program, *options):
        monkeypatch.setattr(sys, "argv", ["program", *options])
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return refuse


def test_options_of_a_gpu_are_checked(refusal):
    said = refusal(lstm, "--precision", "fp16-autocast")
    assert "argument --precision: fp16-autocast is not measured with --device cpu" in said
    said = refusal(on_gpu, "--stages", "build,shine")
    assert "argument --stages: 'shine' is none of build, test, bench, sanitize" in said
    assert "argument --limit: must be more than 5 seconds, got 0" in refusal(on_gpu, "--limit", "0")
    assert "kernels are of cuda" in refusal(profile_step, "--device", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_begins(tmp_path, capsys, refusal):
    sentence = f"torch {torch.__version__} sees no CUDA device here: this needs an NVIDIA GPU, its driver"
    assert on_gpu.main(["--out", str(tmp_path / "new")]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.startswith(f"on_gpu: {sentence}") and said.err.count("\n") == 1
    for program in PROGRAMS:
        said = refusal(program, "--device", "cuda", "--results", str(tmp_path))
        assert f"argument --device: {sentence}" in said
    assert not list(tmp_path.iterdir())


class FakeCuda:
    """torch.cuda as the clock sees it, with a time that only `work` moves: what was done, in order."""

    def __init__(self):
        self.now, self.done = 0.0, []

    def Event(self, enable_timing):
        event = type("Event", (), {})()
        event.record = lambda: (setattr(event, "at", self.now), self.done.append("mark"))
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def work(self, ms):
        self.now += ms
        self.done.append("work")

    def synchronize(self):
        self.done.append("wait")

    def _sleep(self, cycles):
        assert cycles > 0
        self.done.append("sleep")


def test_clock_of_a_gpu():
    """Median of the calls, in seconds; the cache is written over and the GPU held before each of them."""
    cuda = FakeCuda()
    clock = clocks.EventClock(ahead=True, flush=lambda: cuda.done.append("flush"), cuda=cuda)
    lengths = iter([3, 1, 2])

    def run(mark):
        begin = mark()
        cuda.work(next(lengths, 5))
        middle = mark()
        cuda.work(1)
        return begin, middle, mark()

    assert clock.sample(run, clocks.Plan(calls=3, wait=1e-3, host=0, back_to_back=0)) == (2e-3, 3e-3)
    one = ["flush", "sleep", "mark", "work", "mark", "work", "mark"]
    assert cuda.done == ["wait", *3 * one, "wait"]
    plan = clock.warm_up(run)
    assert clocks.CALLS[0] <= plan.calls <= clocks.CALLS[1]
    assert plan.back_to_back == 6e-3 and plan.wait > 0
    assert clock.describe()["l2_flushed"] and clock.describe()["empty_call_us"] == 0
    cuda.done.clear()
    steps_clock = clocks.EventClock(ahead=False, cuda=cuda)
    assert steps_clock.sample(run, clocks.Plan(2, 0.0, 0, 0)) == (5e-3, 6e-3)
    assert "sleep" not in cuda.done and cuda.done.count("work") == 6  # two calls and the one before them


def test_a_side_that_fails_on_a_gpu_is_recorded_and_left_out():
    def broken(mark):
        raise RuntimeError("no kernel")

    sides = [Side("ours", "fp32", broken, device="cuda"), Side("torch", "fp32", lambda mark: (0, 2))]
    assert harness.interleave(sides, repeats=2) == {"torch fp32": [2, 2]}
    assert harness.failures(sides) == {"failed": {"ours fp32": "RuntimeError: no kernel"}}


GPU = {"device": "NVIDIA Made-Up 100", "gpu": {"driver": "1", "cuda": "13.0", "cudnn": 1}}


def publish(monkeypatch, folder, place, sides):
    """Writes a made-up record as the programs do."""
    device = "cuda" if "gpu" in place else "cpu"
    facts = {"isa": "amx", "threads": 2, "commit": "0" * 40, "command": "made up", "date": "2000-01-01"}
    facts |= {"load_average_1min": 0.0, "versions": {}}
    monkeypatch.setattr(harness, "provenance", lambda threads, device: facts | place)
    args = argparse.Namespace(device=device, results=folder, repeats=2, quick=False)
    roof = dict.fromkeys([f"{p}_gflops" for p in ("fp32", "high", "bf16")], 1e3) | {"copy_gb_s": 100.0}
    cases = {"all layers": {"shapes": {}, "sides": sides, "failed": {"ours high": "RuntimeError: no"}}}
    harness.publish(args, "lstm", 2, {"preset": "ulmfit", "batch": 64, "bptt": 72}, roof, cases)


def made_up_sides():
    """Ours in 2 ms, torch in 5 ms, torch undropped in 4 ms, half of each in the forward."""
    roof, sides = {"bf16_gflops": 2e3, "copy_gb_s": 100.0}, {}
    for library, ms in (("ours", 2.0), ("torch", 5.0), ("torch undropped", 4.0)):
        side = Side(library, "bf16-autocast", None, plan=clocks.Plan(3, 0.001, 0.0005, 0.003))
        figures = harness.figures(side, [(ms / 2e3, ms / 1e3)] * 2, gradient_error=None)
        sides[side.name] = floors.add_floor(figures, roof, flops=1e9, traffic=1e6)
    return sides


def test_report_keeps_gpus_apart(tmp_path, monkeypatch):
    sides = made_up_sides()
    assert sides["ours bf16-autocast"]["floor_ms"] == 0.5
    assert sides["torch bf16-autocast"]["floor_share"] == 0.1
    publish(monkeypatch, tmp_path, GPU, sides)
    path = tmp_path / "speed-lstm-ulmfit-batch64-bptt72-made-up-100.json"
    assert json.loads(path.read_text())["gpu"]["cuda"] == "13.0"
    assert len(report.write_report(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed-made-up-100.png"]
    publish(monkeypatch, tmp_path, {"device": "a processor (family 6)", "isa": "avx2"}, sides)
    assert (tmp_path / "speed-lstm-ulmfit-batch64-bptt72-a-6-avx2-threads2.json").exists()
    assert len(report.write_report(tmp_path)) == 2 and (tmp_path / "speed-a-6-avx2.png").exists()
    cpu, cuda = (tmp_path / "speed.md").read_text().split("\n# NVIDIA Made-Up 100\n")
    assert "\n# a processor (family 6), avx2\n" in cpu
    assert "72, 2 threads\n" in cpu and "## LSTM layers: ulmfit, batch 64, bptt 72, NVIDIA" not in cpu
    assert "## LSTM layers: ulmfit, batch 64, bptt 72, NVIDIA Made-Up 100" in cuda and "threads" not in cuda
    assert "torch undropped bf16-autocast | 2.000, 4.000 ms | **2.00**" in cuda
    assert "ours high: `RuntimeError: no`" in cuda
    summary = report.summary(report.load_all(tmp_path, "speed"))
    assert "### a processor (family 6), avx2" in summary and "### NVIDIA Made-Up 100" in summary


def test_report_where_nothing_of_ours_worked(tmp_path, monkeypatch):
    peers = {name: side for name, side in made_up_sides().items() if side["library"] != "ours"}
    publish(monkeypatch, tmp_path, GPU, peers)
    assert len(report.write_report(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob("speed*") if path.suffix != ".json"] == ["speed.md"]


def test_a_side_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "before")
    side = Side("ours", "fp32", None, variant="v", environment={"SOME_VARIABLE": "in", "ANOTHER": "too"})
    with side.settings():
        assert (os.environ["SOME_VARIABLE"], os.environ["ANOTHER"]) == ("in", "too")
    assert os.environ["SOME_VARIABLE"] == "before" and "ANOTHER" not in os.environ
    assert side.name == "ours fp32, v"


def test_parts_of_a_step_are_built_from_what_is_there():
    assert len(set(map(tuple, lstm_parts.VARIANTS.values()))) == len(lstm_parts.VARIANTS)
    assert all((ROOT / source).is_file() for source in lstm_parts.SOURCES)


def test_a_part_that_hangs_or_fails_costs_its_own_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(lstm_parts, "SECONDS", 2)
    says = {"all": "echo '{\"forward_us\": 1}'", "rest": "echo no >&2; exit 1", "barrier": "exec sleep 99"}
    for name, line in says.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    assert lstm_parts.measure({name: tmp_path / name for name in says}, (4, 3, 2)) == {
        "all": {"forward_us": 1},
        "rest": {"failed": "no"},
        "barrier": {"failed": "not done after 2 seconds"},
    }


def test_names_of_gpus():
    names = {"NVIDIA H200": "h200", "NVIDIA GeForce RTX 4090": "geforce-rtx-4090", "Tesla T4": "tesla-t4"}
    assert {name: machine.gpu_name(name) for name in names} == names


def test_profile_counts_kernels_of_a_step():
    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [event("kernel", "a", 0, 4), event("kernel", "a", 2, 4), event("gpu_memcpy", "copy", 8, 2)]
    events += [event("cpu_op", "aten::mm", 0, 100), event("gpu_user_annotation", "Optimizer", 0, 10)]
    found = profile_step.summarise(events, steps=2)
    assert (found["kernels"], found["copies"], found["fills"], found["us"]) == (1, 0.5, 0, 5)
    assert found["busy_share"] == 0.8
    assert found["top"][0] == {"name": "a", "calls": 1, "us": 4, "us_each": 4, "share": 0.8}
    assert gpu.longest_kernels([*events, event("kernel", "b", 9, 9)]) == ["b", "a"]


def test_float16_steps_have_float16_errors():
    """Ours alone: torch's LSTM has no float16 on CPUs."""
    errors = steps.gradient_errors(CASE, [Side("ours", "fp16", None)])
    assert 1e-5 < errors["ours fp16"] < 0.02
    step = steps.build(CASE, "ours")
    before = [p.detach().clone() for p in step.parameters]
    step.run("fp16", lambda: None)
    assert not all(map(torch.equal, before, step.parameters))
