"""Run directories: whose files they may replace, one process at a time, what a failure leaves."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import loop, plots, runs
from ulmfit_fast.locks import locked

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(24)
ONE = TINY | SIZES | dict(epochs=1)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return uf.pretrain_lm(TEXTS, tmp_path_factory.mktemp("runs") / "lm", valid=TEXTS[:5], **ONE)


def at_step(step, error):
    def callback(line):
        if line["step"] == step:
            raise error

    return callback


def interrupted(out, **options):
    with pytest.raises(KeyboardInterrupt):
        uf.pretrain_lm(TEXTS, out, callback=at_step(3, KeyboardInterrupt), **ONE | options)
    return out


def test_a_picture_that_fails_costs_no_run(tmp_path, monkeypatch):
    def fail(history, stage):
        raise ValueError("no such backend")

    monkeypatch.setattr(plots, "curves", fail)
    with pytest.warns(UserWarning, match="curves.png' could not be drawn: ValueError: no such backend"):
        lm = uf.pretrain_lm(TEXTS, tmp_path / "x", **ONE)
    assert runs.read_config(lm.path)["finished"] and not (lm.path / "state.pt").exists()
    with pytest.warns(UserWarning, match="could not be drawn"):
        interrupted(tmp_path / "y")


def test_a_finished_run_is_resumed_with_its_own_data_and_options_alone(lm, tmp_path):
    calls = {
        r"changed: epochs=4 \(was 1\)": lambda: uf.pretrain_lm(
            TEXTS, lm.path, valid=TEXTS[:5], resume=True, **ONE | dict(epochs=4)
        ),
        "resume needs the texts": lambda: uf.pretrain_lm(
            TEXTS[1:], lm.path, valid=TEXTS[:5], resume=True, **ONE
        ),
        "validation set": lambda: uf.pretrain_lm(TEXTS, lm.path, resume=True, **ONE),
        "holds a run of stage 'pretrain', not 'finetune'": lambda: uf.finetune_lm(
            lm, TEXTS, lm.path, resume=True, **TINY
        ),
        "holds a run of stage 'pretrain', not 'classify'": lambda: uf.train_classifier(
            lm, TEXTS, LABELS, lm.path, resume=True, **TINY
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    uf.train_classifier(lm, TEXTS, LABELS, tmp_path / "clf", **TINY)
    again = uf.train_classifier(lm, TEXTS, LABELS, tmp_path / "clf", resume=True, **TINY)
    assert again.classes == ["bad", "good"]
    other = uf.pretrain_lm(TEXTS, tmp_path / "other", **TINY | SIZES | dict(seed=5))  # the same words
    with pytest.raises(ValueError, match="base model the run in out=.* was started with"):
        uf.train_classifier(other, TEXTS, LABELS, tmp_path / "clf", resume=True, **TINY)
    for options in (dict(from_scratch=True), dict(valid=(TEXTS[:3], LABELS[:3]))):
        with pytest.raises(ValueError, match="base model the run in out=.* was started with"):
            uf.train_classifier(lm, TEXTS, LABELS, tmp_path / "clf", resume=True, **TINY | options)


def test_overwriting_takes_the_old_weights_away_first(lm, tmp_path):
    shutil.copytree(lm.path, tmp_path / "x")
    with pytest.raises(RuntimeError, match="the power went"):
        uf.pretrain_lm(
            TEXTS,
            tmp_path / "x",
            overwrite=True,
            callback=at_step(2, RuntimeError("the power went")),
            **ONE | dict(lr=0.5),
        )
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "tokenizer.json",
    ]
    with pytest.raises(FileNotFoundError, match="has no model.safetensors yet"):
        uf.load(tmp_path / "x")


@pytest.mark.parametrize("how", [dict(), dict(resume=True), dict(overwrite=True)])
def test_files_of_others_stay(tmp_path, how):
    (tmp_path / "state.pt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    with pytest.raises(FileExistsError, match="is no run directory, but has state.pt, which a run would"):
        uf.pretrain_lm(TEXTS, tmp_path, **ONE, **how)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="is no run directory, but has config.json, state.pt"):
        uf.pretrain_lm(TEXTS, tmp_path, **ONE, **how)
    assert (tmp_path / "state.pt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "notes.txt", "config.json"}


def test_a_damaged_config_can_be_overwritten(lm, tmp_path):
    shutil.copytree(lm.path, tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text('{"format": 1, "st')
    assert uf.pretrain_lm(TEXTS, tmp_path / "x", overwrite=True, **ONE).metrics["epoch"] == 1


def test_a_damaged_state_is_not_gone_on_from(tmp_path):
    state = interrupted(tmp_path / "x") / "state.pt"
    whole = state.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + bytes(b ^ 0x55 for b in whole[middle:][:64]) + whole[middle + 64 :],
        b"",
    ):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match="state.pt' cannot be read.*overwrite=True starts anew"):
            uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE)
    torch.save({"epoch": 0}, state)
    with pytest.raises(ValueError, match="another version of ulmfit_fast saved it"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE)
    state.write_bytes(whole)
    assert uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE).metrics["epoch"] == 1


HOLDER = """
import pathlib, sys
from ulmfit_fast.locks import locked
with locked(pathlib.Path(sys.argv[1]), "out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    out = interrupted(tmp_path / "x")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, out / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        for how in (dict(resume=True), dict(overwrite=True)):
            with pytest.raises(BlockingIOError, match=f"in use: process {holder.pid} is training there"):
                uf.pretrain_lm(TEXTS, out, **how, **ONE)
        holder.kill()
    assert (out / ".lock").exists() and (out / "state.pt").exists()
    uf.pretrain_lm(TEXTS, out, resume=True, **ONE)
    assert not (out / ".lock").exists()


def test_a_run_holds_its_directory(tmp_path):
    seen = []

    def again(line):
        with pytest.raises(
            BlockingIOError, match=f"in use: process {os.getpid()} is training there"
        ) as refused:
            uf.pretrain_lm(TEXTS, tmp_path / "x", overwrite=True, **ONE)
        seen.append(refused)

    uf.pretrain_lm(TEXTS, tmp_path / "x", callback=again, **ONE)
    assert seen


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    with locked(tmp_path / ".lock", "out"):
        end, begin = os.pipe()
        child = os.fork()
        if not child:
            os.close(begin)
            os.read(end, 1)  # until the parent closes its end
            os._exit(0)
        os.close(end)
    with locked(tmp_path / ".lock", "out"):
        pass
    os.close(begin)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_removes_what_a_killed_process_left(tmp_path):
    out = interrupted(tmp_path / "x")
    for name in (".state.pt.123.tmp", ".model.safetensors.123.tmp", ".mine.tmp"):
        (out / name).write_text("half")
    uf.pretrain_lm(TEXTS, out, resume=True, **ONE)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".mine.tmp"]


def test_a_torn_last_metrics_line_is_left_out(lm, tmp_path):
    shutil.copytree(lm.path, tmp_path / "x")
    file = tmp_path / "x" / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "tra')
    assert uf.load(tmp_path / "x").history == lm.history
    file.write_text("broken\n" + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl', line 1 is no metrics line"):
        uf.load(tmp_path / "x")


def test_a_full_disk_leaves_no_part_of_a_metrics_line(tmp_path, monkeypatch):
    run = runs.RunDirectory(tmp_path)
    run.log({"kind": "train"})

    class Full:
        def __enter__(self):
            return self

        def write(self, text):
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write(text[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(runs, "open", lambda *a, **k: Full(), raising=False)
    with pytest.raises(OSError, match="No space left on device: '.*metrics.jsonl'"):
        run.log({"kind": "valid"})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"kind": "train"}\n'


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: '.*config.json'"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", **ONE)


def test_a_disk_that_is_full_at_the_lock_is_named(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device: '.*/.lock'"):
            with locked(tmp_path / ".lock", "out"):
                pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / ".lock", "out"):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_figures_of_an_epoch_are_of_all_its_texts(tmp_path):
    clf = uf.train_classifier(None, TEXTS, LABELS, tmp_path / "x", **TINY | dict(log_every=4))
    every = uf.train_classifier(None, TEXTS, LABELS, tmp_path / "y", **TINY)
    last = [line for line in every.history if line["kind"] == "train" and line["epoch"] == 2]
    assert len(last) == 6
    for name in ("loss", "accuracy"):
        mean = sum(line[name] for line in last) / len(last)
        assert clf.metrics[name] == pytest.approx(mean) and every.metrics[name] == pytest.approx(mean)
    assert clf.metrics["epoch"] == 2 and uf.load(clf.path).metrics == clf.metrics
    # a last batch of two texts among those of four
    few = uf.train_classifier(None, TEXTS[:22], LABELS[:22], tmp_path / "z", **TINY).metrics["accuracy"] * 22
    assert few == pytest.approx(round(few), abs=1e-9)


def test_an_update_that_spoils_the_weights_is_noticed_before_they_are_saved(tmp_path, monkeypatch):
    step = loop.Loop._take_step

    def spoil_the_last(self, batch):
        result = step(self, batch)
        if self.batch == len(self.batches(self.epoch)) - 1:
            self.groups[0][0].data.fill_(torch.nan)
        return result

    monkeypatch.setattr(loop.Loop, "_take_step", spoil_the_last)
    with pytest.raises(FloatingPointError, match="became infinite or NaN by step .* keeps no state yet"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", **ONE)
    assert not json.loads((tmp_path / "x" / "config.json").read_text())["finished"]
    assert not (tmp_path / "x" / "model.safetensors").exists()


def test_sigterm_saves_as_ctrl_c_does(tmp_path):
    def send(line):
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3.*resume=True"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", callback=send, **ONE)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert torch.load(tmp_path / "x" / "state.pt", weights_only=True)["step"] == 3


def test_too_little_to_validate_with_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="valid is too short: 1 token"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", valid=[""], **ONE)
    assert not (tmp_path / "x").exists()
