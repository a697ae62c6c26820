"""Damaged files of a run, and full disks: an exception that names the file, and nothing saved is lost."""

import errno
import os
import pathlib
import shutil
import subprocess

import pytest
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, _ = sentences(24)
ONE = TINY | dict(epochs=1)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return uf.pretrain_lm(TEXTS, tmp_path_factory.mktemp("bad") / "lm", **ONE | SIZES)


DAMAGES = {
    "truncated model": (
        "model.safetensors",
        lambda p: p.write_bytes(p.read_bytes()[:-9]),
        "model.safetensors",
    ),
    "foreign model": (
        "model.safetensors",
        lambda p: p.write_bytes(b"PK\3\4 something else"),
        "model.safetensors",
    ),
    "no config": ("config.json", lambda p: p.write_text("{"), "config.json' does not describe a run"),
    "unknown stage": (
        "config.json",
        lambda p: p.write_text(p.read_text().replace('"pretrain"', '"pretain"')),
        "unknown stage 'pretain'; did you mean 'pretrain'",
    ),
    "unknown key": (
        "config.json",
        lambda p: p.write_text(p.read_text().replace('"lr"', '"lrs"')),
        "did you mean 'lr'",
    ),
    "other sizes": (
        "config.json",
        lambda p: p.write_text(p.read_text().replace('"n_hid": 16', '"n_hid": 20')),
        r"\(64, 16\) in the file, \(80, 20\) in the model",
    ),
    "foreign tokenizer": (
        "tokenizer.json",
        lambda p: p.write_text("{}"),
        "tokenizer.json is not a tokenizer of",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_runs(name, lm, tmp_path):
    file, damage, message = DAMAGES[name]
    shutil.copytree(lm.path, tmp_path / "run")
    damage(tmp_path / "run" / file)
    with pytest.raises(ValueError, match=message):
        uf.load(tmp_path / "run")


def test_damaged_state(lm, tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uf.pretrain_lm(TEXTS, tmp_path / "x", callback=stop, **ONE | SIZES)
    with pytest.raises(ValueError, match="has not finished; go on with it"):
        uf.finetune_lm(tmp_path / "x", TEXTS, tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="no model.safetensors yet"):
        uf.load(tmp_path / "x")
    state = tmp_path / "x" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="state.pt' cannot be read.*overwrite=True starts anew"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", resume=True, **ONE | SIZES)


def check_the_earlier_state_survives(out):
    """After a full disk: no half-written file, and the run goes on from what was saved before."""
    assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]
    result = uf.pretrain_lm(TEXTS, out, resume=True, save_every=2, **ONE | SIZES)
    assert result.metrics["epoch"] == 1


def test_full_disk_while_saving(tmp_path, monkeypatch):
    write, saves = pathlib.Path.write_bytes, []

    def full(self, data):
        if "state.pt" in self.name:
            saves.append(self)
            if len(saves) == 2:
                write(self, bytes(data)[:100])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            uf.pretrain_lm(TEXTS, tmp_path / "x", save_every=2, **ONE | SIZES)
    check_the_earlier_state_survives(tmp_path / "x")


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here: it takes root")
    try:

        def fill(line):
            if line["step"] == 3:
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "filler").write_bytes(bytes(max(0, free - 8192)))

        with pytest.raises(OSError, match="No space left on device"):
            uf.pretrain_lm(TEXTS, disk / "x", save_every=2, callback=fill, **ONE | SIZES)
        (disk / "filler").unlink()
        check_the_earlier_state_survives(disk / "x")
    finally:
        subprocess.run(["umount", disk], check=True)
