"""Damaged checkpoints: a changed bit or a missing end is a ValueError naming the file, or changes nothing."""

import tempfile
from pathlib import Path

import foreign_files as files
import pytest
import torch
from foreign_files import WORDS, language_model, packed
from hypothesis import given, settings
from hypothesis import strategies as st

import ulmfit_fast as uf
from ulmfit_fast.checkpoints import save_model
from ulmfit_fast.unpickling import read_torch

pytest.importorskip("safetensors")


def whole_files():
    """{kind: bytes} of one model, a zip file, our safetensors, and an archive."""
    lm = language_model()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "lm", lm, {"tokens": WORDS})
        ours = (Path(folder) / "lm").read_bytes()
        archive = files.published(Path(folder) / "a.tgz", lm).read_bytes()
    return lm, {"torch": packed(lm.state_dict()), "ours": ours, "archive": archive}


LM, WHOLE = whole_files()


def same_or_refused(data, must_fail=False):
    """Loads: either a ValueError that names the file, or the tensors and words that were saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        try:
            found = uf.load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
            return
    assert not must_fail
    assert found.tokens in (None, WORDS)
    own = LM.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in found.state.items())


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_is_an_error_or_changes_nothing(kind, where, bit):
    data = bytearray(WHOLE[kind])
    data[int(where * len(data))] ^= 1 << bit
    same_or_refused(data)


@pytest.mark.parametrize("kind", WHOLE)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error(kind, kept):
    same_or_refused(WHOLE[kind][: int(kept * len(WHOLE[kind]))], must_fail=True)


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_in_the_older_format_never_grows_or_runs(where, bit):
    """It has no check sum: a changed number goes unnoticed, a changed structure does not."""
    data = bytearray(packed(LM.state_dict(), zipped=False))
    data[int(where * len(data))] ^= 1 << bit
    try:
        content = read_torch(bytes(data), "old")
    except ValueError as error:
        assert "old" in str(error)
    else:
        assert sum(t.nbytes for t in content.values()) <= 3 * len(data)


@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_older_file_is_an_error(kept):
    data = packed(LM.state_dict(), zipped=False)
    with pytest.raises(ValueError, match="old"):
        read_torch(data[: int(kept * len(data))], "old")


def test_every_tensor_byte_of_a_zip_and_of_ours_is_checked():
    for kind in ("torch", "ours"):
        data = WHOLE[kind]
        start = data.index(LM[0].rnns[1].weight_hh_l0_raw.detach().numpy().tobytes())
        for where in range(start, start + 4 * 24 * 6, 37):
            same_or_refused(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :], must_fail=True)
