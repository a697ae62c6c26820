"""Runs that others are at: threads and processes beside, what a killed or a diverged one leaves."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import cli, fitting, locks, loop, runs

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(24)
ONE = TINY | SIZES | dict(epochs=1)


def losses(path):
    return [line["loss"] for line in runs.read_history(path) if line["kind"] == "train"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return uf.pretrain_lm(TEXTS, tmp_path_factory.mktemp("runs") / "lm", **ONE)


def in_thread(call):
    """Runs call() in a thread; () -> what it returned, once it has, or raised."""
    outcome = []

    def run():
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join()
        value, error = outcome[0]
        if error:
            raise error
        return value

    return result


def test_trainings_in_threads_have_the_numbers_they_have_alone(lm, tmp_path, capsys):
    second = []

    def start_another(line):  # in the middle of the first
        if not second:
            other = dict(ONE, progress="lines")
            second.append(in_thread(lambda: uf.pretrain_lm(TEXTS, tmp_path / "b", **other)))

    uf.pretrain_lm(TEXTS, tmp_path / "a", callback=start_another, **ONE)
    second[0]()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(lm.path)
    assert f"{tmp_path / 'b'} waits: another thread of this process is training" in capsys.readouterr().err


def test_a_training_within_a_callback_does_not_change_the_one_around_it(lm, tmp_path):
    def train_another(line):
        if line["step"] == 2:
            uf.pretrain_lm(TEXTS, tmp_path / "inner", **ONE | dict(seed=3))

    uf.pretrain_lm(TEXTS, tmp_path / "outer", callback=train_another, **ONE)
    assert losses(tmp_path / "outer") == losses(lm.path) != losses(tmp_path / "inner")


def test_a_training_that_fails_lets_the_next_begin(tmp_path):
    def fail(line):
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        in_thread(lambda: uf.pretrain_lm(TEXTS, tmp_path / "a", callback=fail, **ONE))()
    uf.pretrain_lm(TEXTS, tmp_path / "b", **ONE)


@pytest.mark.parametrize("how", [dict(), dict(resume=True), dict(overwrite=True)])
def test_a_run_in_progress_is_not_called_interrupted(how, lm, tmp_path, capsys):
    seen = []

    def look(line):
        with pytest.raises(BlockingIOError) as refused:
            uf.pretrain_lm(["no such text.txt"], tmp_path / "x", **how, **ONE)
        with pytest.raises(ValueError) as unfinished:
            uf.finetune_lm(tmp_path / "x", TEXTS, tmp_path / "y", **TINY)
        flags = [f"--{name}" for name in how]
        assert cli.main(["finetune", str(lm.path), __file__, "--out", str(tmp_path / "x"), *flags]) == 2
        seen[:] = str(refused.value), str(unfinished.value), capsys.readouterr().err

    uf.pretrain_lm(TEXTS, tmp_path / "x", callback=look, **ONE)
    process = f"process {os.getpid()} is training there"
    busy = f"out={str(tmp_path / 'x')!r} is in use: {process}"
    assert seen == [
        busy,
        f"base_run={str(tmp_path / 'x')!r} is in progress: {process}",
        f"ulmfit-fast finetune: error: {busy}\n",
    ]


def test_the_lock_of_a_dead_process_holds_nothing(tmp_path):
    code = "import os, pathlib, ulmfit_fast.locks as l\nwith l.locked(pathlib.Path('.lock'), ''): os._exit(9)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment).returncode == 9
    assert (tmp_path / ".lock").read_text()  # its process id
    assert locks.holder(tmp_path / ".lock") is None
    uf.pretrain_lm(TEXTS, tmp_path, **ONE)
    assert not (tmp_path / ".lock").exists()


def test_resume_does_what_a_kill_after_the_end_left_undone(lm, tmp_path):
    shutil.copytree(lm.path, tmp_path / "x")
    (tmp_path / "x" / "curves.png").unlink()
    (tmp_path / "x" / ".lock").write_text("4194304")
    (tmp_path / "x" / "state.pt").write_text("of no use")
    again = uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE)
    assert losses(again.path) == losses(lm.path)
    names = {"config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl", "curves.png"}
    assert {p.name for p in (tmp_path / "x").iterdir()} == names


def test_resume_reads_a_finished_run_while_another_process_tidies_it_up(lm, tmp_path):
    shutil.copytree(lm.path, tmp_path / "x")
    (tmp_path / "x" / "curves.png").unlink()
    with locks.locked(tmp_path / "x" / ".lock", "x"):
        assert uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE).metrics == lm.metrics
        with pytest.raises(BlockingIOError, match="is in use"):
            uf.pretrain_lm(TEXTS, tmp_path / "x", overwrite=True, **ONE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_a_forked_process_waits_for_no_thread_of_its_parent():
    held, done = threading.Event(), threading.Event()

    def train():
        with fitting._one_thread:
            held.set()
            done.wait()

    thread = threading.Thread(target=train)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if fitting._one_thread.acquire(blocking=False) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_resume_reads_a_finished_run_where_it_may_not_write(lm, tmp_path, monkeypatch):
    shutil.copytree(lm.path, tmp_path / "x")
    (tmp_path / "x" / "curves.png").unlink()
    monkeypatch.setattr(runs.os, "access", lambda path, mode: False)
    monkeypatch.setattr(runs, "_try_to_write", lambda path: pytest.fail("nothing is to be written"))
    assert uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE).metrics == lm.metrics
    assert not (tmp_path / "x" / "curves.png").exists()


@pytest.mark.parametrize(("clip", "lower"), [(0.4, "clip"), (0.0, "a clip above 0")])
def test_the_advice_after_a_divergence_can_be_followed(clip, lower, tmp_path, monkeypatch):
    trained = []

    class Spy(loop.Loop):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            trained.append(self)

    def poison(line):
        if line["step"] == 4:
            trained[0].model[0].encoder.weight.data.fill_(math.nan)

    options = ONE | dict(save_every=3, clip=clip)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "Loop", Spy)
        with pytest.raises(FloatingPointError) as stopped:
            uf.pretrain_lm(TEXTS, tmp_path / "x", callback=poison, **options)
    said = str(stopped.value)
    assert f"at lr=0.02, clip={clip}. Start anew with a lower lr or {lower}, by overwrite=True" in said
    assert "(--overwrite) or with another out: resume=True (--resume) keeps both." in said
    assert said.endswith("keeps the state saved after step 3")
    with pytest.raises(ValueError, match=r"changed: lr=0.01 \(was 0.02\)"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **options | dict(lr=0.01))
    uf.pretrain_lm(TEXTS, tmp_path / "other", **options | dict(lr=0.01))
    uf.pretrain_lm(TEXTS, tmp_path / "x", overwrite=True, **options | dict(lr=0.01))
    assert json.loads((tmp_path / "x" / "config.json").read_text())["config"]["lr"] == 0.01
