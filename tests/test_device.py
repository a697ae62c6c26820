"""--device: refused with one sentence where it cannot be had; no test file needs a GPU to be imported."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent


def collect(*options):
    """pytest without a GPU, up to the point where it would run the tests."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *options, TESTS]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


BREAKS = """
import pytest, torch

def fault(device=None):
    raise RuntimeError("device-side assert triggered")

def test_before(): pass

def test_that_breaks_it(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fault

@pytest.mark.parametrize("n", range(9))
def test_after(n): pass
"""


@pytest.mark.parametrize("options, passed", [([], 2), (["-n", "1"], 11)], ids=["alone", "xdist"])
def test_the_test_that_breaks_a_gpu_is_named_and_the_last_of_its_process(tmp_path, options, passed):
    if options:
        pytest.importorskip("xdist")
    for name in ("conftest.py", "checks.py"):
        shutil.copy(TESTS / name, tmp_path)
    (tmp_path / "test_it.py").write_text(BREAKS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "test_it.py::test_that_breaks_it leaves the GPU broken: device-side assert triggered" in said
    assert f"{passed} passed" in said


def test_all_files_are_imported_without_a_gpu():
    done = collect()
    assert done.returncode == 0, done.stdout
    for name in ("test_cuda.py", "test_cuda_runtime.py"):
        assert f"{name}:" in done.stdout


@pytest.mark.parametrize(
    "device, sentence",
    [
        ("cuda", "--device cuda: torch sees no CUDA device here"),
        ("gpu", "--device must be cpu, cuda or cuda:1, got 'gpu'"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_in_one_sentence(device, sentence):
    done = collect("--device", device)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.strip().splitlines()[-1] == f"ERROR: {sentence}"
    assert "Traceback" not in done.stderr
