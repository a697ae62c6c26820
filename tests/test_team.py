"""A run by two processes that torchrun starts: the numbers of one process, one run directory, no hang."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import team

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

HERE = pathlib.Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = [
    pytest.mark.cpu_only("two processes with gloo"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


def start(*arguments, **options):
    path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one process, the first of two, the second of two): what team_probe.py saved."""
    folder = tmp_path_factory.mktemp("team")
    probe = HERE / "team_probe.py"
    runs = [start(probe, folder), start(*TORCHRUN, probe, folder)]
    for run in runs:
        try:
            _, errors = run.communicate(timeout=300)
        finally:
            run.kill()
        assert run.returncode == 0, errors
    return [torch.load(folder / name) for name in ("0-of-1.pt", "0-of-2.pt", "1-of-2.pt")]


@pytest.mark.parametrize("run", ["lm", "few columns", "tuned", "lm, loaded"])
def test_without_dropout_the_numbers_are_those_of_one_process(results, run):
    alone, first, _ = (result[run] for result in results)
    assert len(alone["lines"]) == len(first["lines"])
    for a, b in zip(alone["lines"], first["lines"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == (b[name] if isinstance(b[name], str) else pytest.approx(b[name], rel=1e-5)), (
                name
            )
    for name, weight in alone["weights"].items():  # steps of Adam are of the size lr = 0.01 or so
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize("run", ["lm", "tuned", "dropout", "classifier", "classifier, resumed"])
def test_the_processes_end_with_the_same_weights(results, run):
    _, first, second = (result[run] for result in results)
    assert first["lines"] == second["lines"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


@pytest.mark.parametrize("run", ["dropout", "classifier"])
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(results, run):
    for result in results:
        whole, parts = result[run], result[f"{run}, resumed"]
        assert parts["said"].startswith("stopped after step")
        assert whole["lines"] == parts["lines"]
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, parts["weights"][name]), name


def test_a_classifier_learns(results):
    for result in results:
        accuracies = [line["accuracy"] for line in result["classifier"]["lines"] if line["kind"] == "valid"]
        assert accuracies[-1] > 0.8


ERRORS = {
    "taken": "FileExistsError: out=",
    "diverged": "FloatingPointError: the loss became",
    "other data": "ValueError: the processes of a run need the same data and options",
    "other options": "ValueError: the processes of a run need the same data and options",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_that_of_every_process(results, name):
    for result in results[1:]:
        assert result["errors"][name].startswith(ERRORS[name])


def test_torchrun_that_is_interrupted_leaves_a_state(tmp_path):
    texts, out = tmp_path / "texts.txt", tmp_path / "run"
    texts.write_text("\n".join(sentences()[0]))
    options = ["--preset", "tiny", "--epochs", "100000", "--log-every", "1", "--batch-size", "4"]
    run = start(*TORCHRUN, "-m", "ulmfit_fast.cli", "pretrain", texts, "--out", out, *options, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode and "the state is saved in" in errors, errors
    assert errors.count("counting and encoding") == 1
    state = torch.load(out / "state.pt", weights_only=True)
    assert len(state["processes"]) == 2 and state["step"] >= 1
    assert not json.loads((out / "config.json").read_text())["finished"]
    with pytest.raises(ValueError, match="as many processes as the run in .* was started with: 2, not 1"):
        uf.pretrain_lm(
            texts, out, "tiny", resume=True, progress=False, epochs=100000, log_every=1, batch_size=4
        )
    assert (out / "state.pt").exists()


class Lonely(team.Team):
    """One process that believes to be of several."""

    def __init__(self, rank, size):
        super().__init__(torch.device("cpu"))
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 64])
def test_weighted_means_of_the_shares_are_the_mean(rows, size):
    batch = torch.rand(rows, 4, dtype=torch.float64), torch.arange(rows)
    shares = [Lonely(rank, size).share(batch) for rank in range(size)]
    mean = sum(weight * values.mean() for (values, _), weight in shares) / size
    torch.testing.assert_close(mean, batch[0].mean())
    for (values, numbers), _ in shares:
        assert torch.equal(values, batch[0][numbers])
        assert len(numbers) >= min(rows, 2)  # batch norm needs two


def test_each_process_has_masks_of_its_own():
    seeds = []
    for rank in range(3):
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            Lonely(rank, 3).own_randomness(5)
            seeds.append(torch.initial_seed())
    assert seeds[0] == 5 and len(set(seeds)) == 3


def test_a_gpu_for_each_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert team._own_gpu() == torch.device("cuda", 1) and chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: torch sees 2"):
        team._own_gpu()


def test_an_error_that_cannot_be_sent_keeps_its_text():
    class Local(Exception):
        pass

    assert str(team._sendable(Local("why"))) == "Local: why"
    assert isinstance(team._sendable(OSError(28, "full")), OSError)


def test_torchrun_with_one_process_is_a_run_alone(monkeypatch, tmp_path):
    for name, value in zip(team.LAUNCHED, ("0", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    uf.pretrain_lm(sentences(9)[0], tmp_path / "x", **TINY | SIZES | dict(epochs=1))
    assert not torch.distributed.is_initialized()
