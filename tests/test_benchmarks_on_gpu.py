"""`on_gpu` as far as it shows without a GPU: its stages, what it leaves, and what it builds."""

import argparse
import json
import os
import pathlib
import sys
import tarfile
from dataclasses import replace

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import on_gpu, on_gpu_check, on_gpu_small, on_gpu_stages  # noqa: E402
from benchmarks.on_gpu_stages import Command, Context  # noqa: E402


def stage_of(*commands):
    return lambda context: [Command(f"c{i}", [sys.executable, "-c", c], 60) for i, c in enumerate(commands)]


def test_on_gpu_keeps_what_it_has_and_goes_on(tmp_path, capsys):
    """A failure, a mistake in a plan or a command that hangs costs its own result and no other."""
    summary = tmp_path / "summary.json"
    look = f"import json; print(json.load(open({str(summary)!r}))['stages']['build']['commands'][0]['tail'])"
    hang = [Command("hang", [sys.executable, "-c", "import time; print('in'); time.sleep(99)"], 1.5)]
    plans = {
        "build": stage_of("print('first')", look),
        "test": stage_of("raise SystemExit('no')", "print('after')"),
        "sanitize": lambda context: "there is no tool",
        "bench": lambda context: 1 / 0,
        "profile": lambda context: hang,
    }
    assert on_gpu.run(plans, Context(tmp_path, "GPU", (9, 0)), {"device": "GPU"}, limit=100) == 1
    stages = json.loads(summary.read_text())["stages"]
    outcomes = {name: stage["outcome"] for name, stage in stages.items()}
    assert outcomes == dict(
        build="passed", test="failed", sanitize="skipped", bench="failed", profile="timed out"
    )
    assert "['first']" in stages["build"]["commands"][1]["tail"]
    assert [c["outcome"] for c in stages["test"]["commands"]] == ["failed", "passed"]
    assert stages["bench"]["why"].startswith("ZeroDivisionError")
    log = (tmp_path / "profile.log").read_text()
    assert "in" in log and "KeyboardInterrupt" in log  # it said where it stood
    assert "there is no tool" in capsys.readouterr().out
    assert on_gpu.run({"build": stage_of("1")}, Context(tmp_path, "GPU", (9, 0)), {}, limit=1) == 1
    assert json.loads(summary.read_text())["stages"]["build"]["outcome"] == "not run"
    assert on_gpu.run({"bench": stage_of("1 / 0")}, Context(tmp_path, "GPU", (9, 0)), {}, limit=60) == 0


def test_a_stage_of_on_gpu_leaves_time_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "LEAST", 0.1)
    hang = [Command("hang", [sys.executable, "-c", "import time; time.sleep(99)"], 99)]
    plans = {"test": lambda context: hang, "bench": stage_of("print('measured')")}
    assert on_gpu.run(plans, Context(tmp_path, "GPU", (9, 0)), {}, limit=4) == 1
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert {n: s["outcome"] for n, s in stages.items()} == {"test": "timed out", "bench": "passed"}


def test_on_gpu_stopped_leaves_its_archive(tmp_path, monkeypatch, capsys):
    """With the logs, the summary and the records of this GPU, but those of earlier runs."""
    results, out, archive = tmp_path / "results", tmp_path / "out", tmp_path / "sub" / "a.tgz"
    monkeypatch.setattr(on_gpu_stages, "RESULTS", results)
    results.mkdir()
    (results / "speed-old-gpu.json").write_text("{}")
    os.utime(results / "speed-old-gpu.json", (1, 1))

    def stopped(context):
        (results / "speed-new-gpu.json").write_text("{}")
        sys.exit(143)

    plans = {"build": lambda context: [replace(c, show=True) for c in stage_of("print('9.0')")(context)]}
    with pytest.raises(SystemExit):
        on_gpu.run(plans | {"bench": stopped}, Context(out, "GPU", (9, 0), archive=archive), {}, limit=60)
    assert "\n  9.0\n" in capsys.readouterr().out
    with tarfile.open(archive) as content:
        names = {pathlib.Path(name).name for name in content.getnames()}
        summary = json.load(content.extractfile("on_gpu/summary.json"))
    assert names == {"build.log", "summary.json", "speed-new-gpu.json"}
    assert summary["stages"]["build"]["outcome"] == "passed"


def test_workers_of_on_gpu_share_all_tests(tmp_path):
    commands = on_gpu_stages.test(Context(tmp_path, "GPU", (9, 0), workers=3))
    assert all(command.environment["OMP_WAIT_POLICY"] == "passive" for command in commands)
    assert commands[-1].environment["ULMFIT_FAST_RECURRENCE"] == "auto"
    assert all(" -n 3" in " ".join(command.words) for command in commands)
    files = [word for command in commands for word in command.words if word.startswith("tests/")]
    assert all((ROOT / name).is_file() for name in files)
    assert files[:3] == [f"tests/{name}" for name in on_gpu_stages.CUDA_TESTS]


def test_a_build_without_cuda_kernels_does_not_pass_as_one_for_this_gpu(capsys, monkeypatch):
    monkeypatch.setattr(on_gpu_check.uf, "info", lambda: argparse.Namespace(cuda_built=None))
    assert on_gpu_check.main() == 1
    assert "cuda_built=None" in capsys.readouterr().out


def test_small_calls_of_the_sanitizer(monkeypatch):
    monkeypatch.setattr(on_gpu_small, "DEVICE", "cpu")
    for op in on_gpu_small.OPS.values():
        for results, tensors in op(on_gpu_small.SIZES[0], torch.float32):
            on_gpu_small.check(results, tensors)


def test_what_is_built_is_not_built_again(tmp_path, monkeypatch):
    """A source that differs from the last build's is compiled again, whatever its time says."""
    source = tmp_path / "csrc" / "cuda" / "a.cu"
    for path in (source, tmp_path / "setup.py", tmp_path / "tools" / "build_plan.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(on_gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu_stages, "BUILT", tmp_path / "built.json")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    context = Context(tmp_path, "GPU", (9, 0))
    works = [False]
    monkeypatch.setattr(on_gpu_stages, "_succeeds", lambda command: works[0])
    compile_, check = on_gpu_stages.build(context)
    assert compile_.environment == {"TORCH_CUDA_ARCH_LIST": "9.0", "ULMFIT_FAST_CUDA": "1"}
    compile_.after("failed")
    assert not on_gpu_stages.BUILT.exists()
    compile_.after("passed")
    works[0] = True
    (there,) = on_gpu_stages.build(context)
    assert there.name == "there already: CUDA kernels" and there.words == check.words
    source.write_text("two")
    os.utime(source, (1, 1))
    assert len(on_gpu_stages.build(context)) == 2
    assert source.stat().st_mtime > 1
