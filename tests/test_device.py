"""--device: refused with one sentence where it cannot be had; no test file needs a GPU to be imported."""

import os
import pathlib
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
