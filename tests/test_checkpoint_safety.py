"""Files that want to do harm, and damaged ones: a ValueError names the file, nothing runs or is written."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from foreign_files import WORDS, language_model, packed
from hypothesis import given
from hypothesis import strategies as st

import ulmfit_fast as uf
from ulmfit_fast.unpickling import Inert, read_tokens, read_torch


class Attack:
    """Unpickled by its rules, it would leave a file behind."""

    def __init__(self, call=os.mkdir, *arguments):
        self.call, self.arguments = call, arguments or ("attacked",)

    def __reduce__(self):
        return self.call, self.arguments


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing but the file under test is in the working directory or above it afterwards."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    yield inner
    assert {path.name for path in inner.iterdir()} <= {"bad.pth", "bad.tgz", "good.tgz"}
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


def refused(data, message=".", name="bad.pth"):
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        uf.load_checkpoint(name)
    assert name in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "attack",
    [
        Attack(),
        Attack(eval, "__import__('os').mkdir('attacked')"),
        Attack(exec, "import os; os.mkdir('attacked')"),
        Attack(torch.hub.load, "a/b", "c"),
        Attack(torch.load, "bad.pth"),
        Attack(io.open, "attacked", "w"),
    ],
    ids=lambda attack: attack.call.__name__,
)
def test_pickled_code_is_not_run(attack, zipped):
    state = language_model().state_dict()
    for content in (attack, {**state, "x": attack}, {"model": state, "opt": attack}, [attack, state]):
        refused(packed(content, zipped), "without running code")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_allowed_beside_tensors_can_do_nothing(zipped):
    content = read_torch(
        packed([Attack(getattr, "abc", "upper"), Attack(OrderedDict, [("a", 1)])], zipped), "x"
    )
    assert isinstance(content[0], Inert) and not vars(content[0]) and content[1] == {"a": 1}


def test_legacy_pickle_that_changes_what_reads_it():
    """BUILD on a function or a class would change it for all later files."""
    lm = language_model()
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(OrderedDict))
    names = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cmodel\nRNNModel\n"]
    for name in names:
        change = name + b"(N}(X\x0c\x00\x00\x00__defaults__X\x01\x00\x00\x00xutb."
        data = packed(1, zipped=False)
        header = data[: data.index(b"K\x01.")]
        refused(header + change + b"\x80\x02].")
    assert (torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(OrderedDict))) == before
    content = read_torch(packed(lm.state_dict(), zipped=False), "good")
    assert torch.equal(content["0.encoder.weight"], lm[0].encoder.weight)


class Claim:
    """A tensor of as many numbers as it likes in a storage of four."""

    def __init__(self, size, stride):
        self.size, self.stride = size, stride

    def __reduce__(self):
        storage = torch.zeros(4).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "claim", [Claim((10**12,), (1,)), Claim((10**6, 10**6), (0, 0)), Claim((100000,), (1,))]
)
def test_tensors_larger_than_their_file(claim, zipped):
    refused(packed({"weight_ih_l0": claim}, zipped), "without running code")


def test_legacy_storage_larger_than_its_file():
    data = packed({"w": torch.zeros(3)}, zipped=False)
    assert data.count(b"K\x03Nt") == 1  # numel in the storage's description
    refused(data.replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt"), "tensors are larger than the file")


def test_tensors_that_are_none():
    for tensor in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse()):
        refused(packed({"weight_ih_l0": tensor}))


def rezip(data, change):
    """A torch zip file whose members go through change(name, bytes) -> (name, bytes, compression)."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w") as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a name twice
        for info in old.infolist():
            for name, content, kind in change(info.filename, old.read(info)):
                new.writestr(name, content, kind)
    return out.getvalue()


def test_zip_bomb_and_doubled_members():
    data = packed(language_model().state_dict())
    bomb = rezip(data, lambda name, content: [(name, content + bytes(10**6), zipfile.ZIP_DEFLATED)])
    assert len(bomb) < 10**5
    refused(bomb, "compressed")
    refused(rezip(data, lambda name, content: [(name, content, 0)] * 2), "two members of one name")
    refused(rezip(data, lambda name, content: [(name.replace("data", ""), content, 0)]), "without a data.pkl")
    big = rezip(data, lambda name, content: [(name, content.replace(b"little", b"big"), 0)])
    refused(big, "another byte order")


def tar(members, compress=True):
    """A gzipped tar of {name: bytes, or a changed TarInfo}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as file:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(kind, target=""):
    info = tarfile.TarInfo("lstm_fwd.pth")
    info.type, info.linkname = kind, target
    return info


WEIGHTS = packed(language_model().state_dict())
GOOD = {"lstm_fwd.pth": WEIGHTS, "itos_wt103.pkl": pickle.dumps(WORDS)}
BAD_TARS = {
    "above": ({**GOOD, "../attacked": b"x"}, "outside"),
    "weights above": ({"../lstm_fwd.pth": WEIGHTS}, "outside"),
    "absolute": ({**GOOD, "/tmp/attacked": b"x"}, "outside"),
    "within a path": ({**GOOD, "a/../../attacked": b"x"}, "outside"),
    "symbolic link": ({"a": special(tarfile.SYMTYPE, "/etc/passwd")}, "neither a plain file nor a folder"),
    "hard link": ({"a": special(tarfile.LNKTYPE, "/etc/passwd")}, "neither a plain file nor a folder"),
    "device": ({"a": special(tarfile.CHRTYPE)}, "neither a plain file nor a folder"),
    "pipe": ({"a": special(tarfile.FIFOTYPE)}, "neither a plain file nor a folder"),
    "bomb": ({"lstm_fwd.pth": bytes(5 * 10**7)}, "far more than its own size|claims"),
    "bomb beside": ({**GOOD, "readme": bytes(5 * 10**7)}, "far more than its own size|claims"),
    "many members": ({str(i): b"" for i in range(1500)}, "more than 1000 members"),
    "no weights": ({"itos.pkl": pickle.dumps(WORDS)}, "holds no"),
    "no weights but a Mac's": ({"._lstm_fwd.pth": WEIGHTS}, "holds no"),
    "words that run": ({**GOOD, "itos_wt103.pkl": pickle.dumps([*WORDS, Attack()])}, "GLOBAL|asks for"),
    "weights that run": ({**GOOD, "lstm_fwd.pth": packed({"x": Attack()})}, "without running code"),
    "words of another size": ({**GOOD, "itos_wt103.pkl": pickle.dumps(WORDS[1:])}, "comes with 21 words"),
}


@pytest.mark.parametrize("what", BAD_TARS)
def test_archives_that_reach_out(what):
    members, message = BAD_TARS[what]
    refused(tar(members), message, "bad.tgz")


def test_archives_with_false_sizes():
    plain = bytearray(tar({"lstm_fwd.pth": b"x" * 600}, compress=False))
    plain[124:136] = b"77777777777\0"  # 8 GiB; the header's sum must fit again
    plain[148:156] = b" " * 8
    plain[148:156] = b"%06o\0 " % sum(plain[:512])
    refused(gzip.compress(plain), "claims 8,589,934,591 bytes", "bad.tgz")
    sparse = tarfile.TarInfo("lstm_fwd.pth")
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(10**10),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as file:
        data = b"0\n".ljust(512, b"\0")
        sparse.size = len(data)
        file.addfile(sparse, io.BytesIO(data))
    refused(buffer.getvalue(), "neither a plain file", "bad.tgz")


WORD_PICKLES = {
    "code": pickle.dumps(Attack()),
    "code in a list": pickle.dumps(["a", Attack()]),
    "a class": pickle.dumps([OrderedDict]),
    "numbers": pickle.dumps([1, 2]),
    "bytes": pickle.dumps([b"a"]),
    "a str": pickle.dumps("abc"),
    "a dict": pickle.dumps({"a": 1}),
    "nothing": b"",
    "text": b"the\nof\n",
    "cut": pickle.dumps(WORDS)[:-3],
    "huge memo": b"\x80\x02](X\x01\x00\x00\x00ar\xff\xff\xff\x7fe.",
    "huge word": b"\x80\x04]\x8d" + struct.pack("<Q", 2**60) + b"a\x94a.",
    "huge bytes": b"\x80\x05]\x96" + struct.pack("<Q", 2**40) + b"a.",
}


@pytest.mark.parametrize("what", WORD_PICKLES)
def test_token_lists(what):
    with pytest.raises(ValueError, match="itos.pkl is not a pickled list of words"):
        read_tokens(WORD_PICKLES[what], "itos.pkl")


@given(st.lists(st.text(), max_size=30), st.integers(0, 5))
def test_token_lists_that_are(words, protocol):
    data = pickle.dumps(words, protocol)
    if protocol >= 2:
        assert read_tokens(data, "itos.pkl") == words


@given(st.binary(max_size=60))
def test_any_bytes_as_a_token_list(data):
    try:
        assert all(isinstance(word, str) for word in read_tokens(data, "x"))
    except ValueError:
        pass


def test_files_of_other_kinds():
    refused(b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file")
    for data in (b"", b"{}", b"once upon a time, in a file", b"\x80\x04]\x94.", bytes(range(256))):
        refused(data)
    with pytest.raises(OSError, match="nowhere"):
        uf.load_checkpoint("nowhere.pth")
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="path='empty' is no run directory"):
        uf.load_checkpoint("empty")
    Path("empty").rmdir()


@pytest.mark.parametrize(
    "header",
    ["[]", '{"metadata": 3}', '{"metadata": {"tokens": [1]}}', '{"shared": {"a": "b"}}', '{"shared": 1}'],
)
def test_our_own_header_written_by_others(header):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {key: tensor.clone() for key, tensor in language_model().state_dict().items()}
    refused(safetensors.save(state, {"ulmfit_fast": header}))
