"""Saving and loading: atomic, restricted, and with messages that name the key."""

import errno
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checks import DEVICE

import ulmfit_fast as uf
from ulmfit_fast.checkpoints import (
    atomic_path,
    atomic_write,
    load_model,
    load_state,
    read_model,
    save_model,
)

pytest.importorskip("safetensors")


def language_model(n_hid=10, vocab=30):
    return uf.LanguageModel(uf.AWDLSTM(vocab, 6, n_hid, 2)).to(DEVICE)


def classifier():
    return uf.TextClassifier(uf.AWDLSTM(30, 6, 10, 2), 3).to(DEVICE)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(map(torch.equal, a.values(), b.values()))


def disk_full(monkeypatch):
    """Every write ends half-way with ENOSPC."""

    def write_bytes(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_round_trip_with_metadata(tmp_path):
    lm, other = language_model(), language_model()
    metadata = {"stage": "pretrain", "sizes": [6, 10], "nothing": None}
    save_model(tmp_path / "lm.safetensors", lm, metadata)
    assert load_model(tmp_path / "lm.safetensors", other) == metadata
    assert equal(lm, other) and other[1].decoder.weight is other[0].encoder.weight
    state, _ = read_model(tmp_path / "lm.safetensors")
    assert set(state) == set(lm.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["lm.safetensors"]


def test_tied_weights_are_stored_once_and_plain_safetensors_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    lm, other = language_model(vocab=5000), language_model(vocab=5000)
    save_model(tmp_path / "lm", lm.state_dict())
    bytes_each = lm[0].encoder.weight.numel() * 4
    assert bytes_each < (tmp_path / "lm").stat().st_size < 2 * bytes_each
    plain = {
        key: value
        for key, value in lm.state_dict().items()
        if not key.startswith(("0.encoder_dp", "1.decoder.w"))
    }
    safetensors.save_file(plain, tmp_path / "plain")
    assert load_model(tmp_path / "plain", other) == {} and equal(lm, other)


def test_classifier_with_its_buffers(tmp_path):
    clf, other = classifier(), classifier()
    clf(torch.randint(0, 30, (4, 5), device=DEVICE))
    save_model(tmp_path / "clf", clf)
    load_model(tmp_path / "clf", other)
    assert equal(clf, other) and other[1].layers[0][0].num_batches_tracked == 1


def test_misfits_are_listed_and_change_nothing():
    lm = language_model()
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    state = dict(language_model(n_hid=12).state_dict())
    del state["1.decoder.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_state(lm, state, source="old.pth")
    message = str(error.value)
    assert message.startswith("old.pth does not fit this LanguageModel")
    assert "missing keys: 1.decoder.bias" in message and "unexpected keys: extra" in message
    assert "12 hidden units in the file, 10 in the model" in message and "words" not in message
    assert "0.rnns.0.weight_hh_l0_raw is (48, 12) in the file, (40, 10) in the model" in message
    assert all(torch.equal(before[key], value) for key, value in lm.state_dict().items())


def test_tied_weights_that_differ_in_the_file_are_refused():
    state = dict(language_model().state_dict())
    state["1.decoder.weight"] = state["1.decoder.weight"] + 1
    with pytest.raises(ValueError, match="1.decoder.weight and 0.encoder.weight are one tensor"):
        load_state(language_model(), state)
    with pytest.raises(ValueError, match=r"names to tensors only, but holds epoch \(int\)"):
        load_state(language_model(), {"epoch": 3})


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_and_foreign_files(tmp_path, kept):
    lm = language_model()
    save_model(tmp_path / "whole", lm)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut"):
        load_model(tmp_path / "cut", lm)
    for text in ("{}", "once upon a time", "x" * 1000, json.dumps({"model": 1})):
        (tmp_path / "text").write_text(text)
        with pytest.raises(ValueError, match="text"):
            read_model(tmp_path / "text")
    with pytest.raises(OSError, match="nowhere"):
        read_model(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    lm = language_model()
    save_model(tmp_path / "lm", lm)
    atomic_write(tmp_path / "note.txt", "grün")
    disk_full(monkeypatch)
    for save in (
        lambda: save_model(tmp_path / "lm", language_model()),
        lambda: atomic_write(tmp_path / "note.txt", b""),
    ):
        with pytest.raises(OSError, match="No space left"):
            save()
    monkeypatch.undo()
    other = language_model()
    load_model(tmp_path / "lm", other)
    assert equal(lm, other) and (tmp_path / "note.txt").read_text(encoding="utf-8") == "grün"
    assert {path.name for path in tmp_path.iterdir()} == {"lm", "note.txt"}


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    atomic_write(tmp_path / "state", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "state") as temporary:
        temporary.write_bytes(b"new")
        assert (tmp_path / "state").read_bytes() == b"old"
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    with atomic_path(tmp_path / "state") as temporary:
        torch.save({"step": 3}, temporary)
    assert torch.load(tmp_path / "state") == {"step": 3}
    with pytest.raises(OSError):
        atomic_write(tmp_path / "missing" / "state", b"")


class NotInstalled:
    """An import hook to which safetensors is unknown."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "safetensors":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_model_is_always_the_same_bytes(tmp_path):
    lm, files = language_model(), set()
    for metadata in [{"stage": "pretrain", "sizes": [6, 10]}, {"sizes": [6, 10], "stage": "pretrain"}] * 8:
        save_model(tmp_path / "a", lm, metadata)
        files.add((tmp_path / "a").read_bytes())
    assert len(files) == 1


def test_a_file_of_two_metadata_entries_is_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    save_model(tmp_path / "new", language_model(), {"stage": "pretrain"})
    content = (tmp_path / "new").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = safetensors.load(content)
    (tmp_path / "old").write_bytes(safetensors.save(tensors, {"format": "pt", **header}))  # as it once was
    assert read_model(tmp_path / "old")[1] == {"stage": "pretrain"}
    assert load_model(tmp_path / "old", language_model()) == {"stage": "pretrain"}


def test_threads_save_to_one_path(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda data: atomic_write(tmp_path / "a", data), contents * 50))
    assert (tmp_path / "a").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_safetensors_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled, *sys.meta_path])
    for call in (lambda: save_model(tmp_path / "a", {}), lambda: read_model(tmp_path / "a")):
        with pytest.raises(ImportError, match="not installed: safetensors.*pip install .*safetensors"):
            call()
