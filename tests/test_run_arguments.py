"""The arguments that all stages share: what is wrong is refused early, in a sentence, by the command too."""

import errno
import os
import pathlib

import numpy as np
import pytest
import torch
from checks import DEVICE
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import cli, initial, progress
from ulmfit_fast.demo import run_demo

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(24)
ONE = TINY | SIZES | dict(epochs=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, but for a file and a link to nowhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    return tmp_path


OUTS = {
    "": (ValueError, "out must be the path of a run directory, got ''"),
    "a\0b": (ValueError, r"out must be the path of a run directory, got 'a\\x00b'"),
    "file": (NotADirectoryError, "out='file' is a file"),
    "file/x": (NotADirectoryError, "out='file/x' cannot be used: Not a directory: 'file'"),
    "link": (FileNotFoundError, "out='link' cannot be used: No such file or directory: 'link'"),
    "n" * 300: (OSError, "out='n*' cannot be used: File name too long: 'n*'"),
    "/proc/x": (OSError, "out='/proc/x' cannot be used: .*: '/proc'"),
}


@pytest.mark.parametrize("out", OUTS)
def test_an_unusable_out_is_refused_before_the_texts_are_read(out, folder):
    error, message = OUTS[out]
    with pytest.raises(error, match=message):
        uf.pretrain_lm(["no such text.txt"], out, **ONE)
    assert sorted(os.listdir()) == ["file", "link"]


def test_the_folders_above_out_are_made(folder):
    assert uf.pretrain_lm(TEXTS, "a/b/c", **ONE).path == folder / "a" / "b" / "c"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(folder):
    os.mkdir("closed", 0o500)
    with pytest.raises(PermissionError, match="out='closed/x' cannot be used: Permission denied: 'closed'"):
        uf.pretrain_lm(["no such text.txt"], "closed/x", **ONE)


def test_the_other_places_of_a_run_are_named_too(folder):
    with pytest.raises(ValueError, match="run_dir must be the path of a run directory, got ''"):
        uf.load("")
    with pytest.raises(ValueError, match="out must be the path of a run directory, got ''"):
        run_demo("", progress=False)
    assert sorted(os.listdir()) == ["file", "link"]


def test_a_folder_that_cannot_be_made_later_names_out(folder, monkeypatch):
    def fail(self, *a, **k):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", fail)
    message = "^out='x' cannot be used: Permission denied: 'x'$"
    with pytest.raises(PermissionError, match=message) as caught:
        uf.pretrain_lm(TEXTS, "x", **ONE)
    assert caught.value.errno == errno.EACCES


DEVICES = ["xpu", "mps", "meta", "hpu", "nonsense", "", 2.5, torch.device("meta")]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_without_kernels_is_refused_first(device, folder, monkeypatch):
    monkeypatch.setattr(initial, "load_checkpoint", lambda *a: pytest.fail("a base model is read first"))
    for call in (
        lambda: uf.pretrain_lm(["no such text.txt"], "x", **ONE | dict(device=device)),
        lambda: uf.finetune_lm("file", ["no such text.txt"], "x", device=device),
        lambda: uf.train_classifier("file", "no such table.csv", out="x", device=device),
    ):
        with pytest.raises(ValueError, match="device must be None, 'cpu', 'cuda' or one") as refused:
            call()
        assert str(refused.value).endswith(f"got {device!r}")
    assert not os.path.exists("x")


def test_a_gpu_that_is_not_there(monkeypatch):
    from ulmfit_fast.devices import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device='cuda:2', but torch sees only cuda:0 to cuda:1 here"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(resume="no"), r"resume must be True or False, got 'no' \(str\)"),
        (dict(overwrite=1), r"overwrite must be True or False, got 1 \(int\)"),
        (dict(from_scratch=None), r"from_scratch must be True or False, got None \(NoneType\)"),
        (dict(backwards=1), r"backwards must be True, False or None, got 1 \(int\)"),
    ],
)
def test_flags_are_bools(options, message, folder):
    with pytest.raises(TypeError, match=message):
        uf.train_classifier(None, TEXTS, LABELS, "x", **TINY | options)


def test_numpys_bools_are_bools(folder):
    yes, no = np.bool_(True), np.bool_(False)
    flags = dict(from_scratch=no, backwards=yes, overwrite=yes, resume=no)
    clf = uf.train_classifier(None, TEXTS, LABELS, "x", **flags, **TINY | dict(epochs=1))
    assert clf.backwards is True and uf.load("x", DEVICE).backwards is True


@pytest.mark.parametrize("show", [1, 0, np.bool_(True), "line", np.array(["lines"])])
def test_progress_is_one_of_four(show):
    with pytest.raises(ValueError, match="progress must be None, True, False or 'lines', got "):
        progress.check_show(show)


@pytest.mark.parametrize("base", [None, 3, TEXTS])
def test_base_run_says_what_it_may_be(base, folder):
    with pytest.raises(TypeError, match="base_run must be a run directory, the path or URL .* got"):
        uf.finetune_lm(base, TEXTS, "x", **TINY)


def test_the_seed_of_generate_has_bounds(folder):
    lm = uf.pretrain_lm(TEXTS, "x", **ONE)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"seed must be None or at least .* got {seed}"):
            lm.generate("The", 2, seed=seed)
    assert cli.main(["predict", "x", "The", "--seed", str(2**64 - 1), "--device", str(DEVICE)]) == 0


def test_no_epsilon_is_refused_as_it_gives_nan_and_the_least_one_does_not(folder):
    lm = uf.pretrain_lm(TEXTS, "x", **ONE)
    few = dict(TINY, epochs=1, eps=1e-30)
    assert uf.train_classifier(lm, TEXTS[:6], LABELS[:6], "y", **few).metrics["loss"] < 100
    with pytest.raises(ValueError, match="ClassifierConfig.eps must be at least 1e-30, got 0.0"):
        uf.train_classifier(lm, TEXTS[:6], LABELS[:6], "z", **few | dict(eps=0.0))


LINES = {
    "out must be the path of a run directory, got ''": ["--out", ""],
    "out='file' is a file": ["--out", "file"],
    "out='file/x' cannot be used: Not a directory": ["--out", "file/x"],
    "device must be None, 'cpu', 'cuda' or one GPU such as 'cuda:1', got 'mps'": ["--device", "mps"],
    "device must be None, 'cpu', 'cuda' or one GPU such as 'cuda:1', got 'xpu'": ["--device", "xpu"],
    "device must be None, 'cpu', 'cuda' or one GPU such as 'cuda:1', got 'meta'": ["--device", "meta"],
    "PretrainConfig.eps must be at least 1e-30, got 0.0": ["--eps", "0"],
    "PretrainConfig.beta1 must be in [0, 1), got 1.0": ["--beta1", "1"],
    "PretrainConfig.lr must be finite, got inf": ["--lr", "inf"],
    f"PretrainConfig.seed must be at most {2**63 - 1}, got {2**64}": ["--seed", str(2**64)],
    "resume=True and overwrite=True contradict each other": ["--resume", "--overwrite"],
    "cuda_graph=True needs a CUDA device, got device='cpu'": ["--cuda-graph", "true", "--device", "cpu"],
}


@pytest.mark.parametrize("message", LINES)
def test_the_command_says_it_in_one_line(message, folder, capsys):
    (folder / "a.txt").write_text("\n".join(TEXTS))
    assert cli.main(["pretrain", "a.txt", "--out", "x", "--preset", "tiny", *LINES[message]]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"ulmfit-fast pretrain: error: {message}") and not said.out
    assert len(said.err.splitlines()) == 1 and not os.path.exists("x")
