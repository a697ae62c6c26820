"""Torch files and pickled token lists read as data: tensors and words come out, no code of a file runs.

Not through torch.load(weights_only=True): it refuses older files that hold modules, believes the sizes that a
file claims, checks no CRC, and shares its list of allowed classes with the whole process.  The unpickler
here knows only tensors. What else such files name (salesforce's model, optimizers) becomes objects that can
do nothing.
"""

import io
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of older files

# modules whose classes may be named beside the tensors; none of them is imported
_IGNORED = re.compile(
    r"(model|weight_drop|locked_dropout|embed_regularize|splitcross|torchqrnn|torch\.nn|torch\.optim"
    r"|ulmfit_fast|fastai|fastcore|numpy|functools)\..+|(__builtin__|builtins)\.(getattr|dict|list|set)|_codecs\.encode"
)
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
_WORDS = frozenset(
    """PROTO FRAME STOP MARK EMPTY_LIST APPEND APPENDS BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINPUT
    LONG_BINPUT MEMOIZE BINGET LONG_BINGET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3""".split()
)
_OBJECTS = _WORDS | frozenset(
    """GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS NONE
    NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINPERSID BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES""".split()
)


class Inert:
    """Stands in for a class that a file names: holds what the file says of the object and can do nothing."""

    def __new__(cls, *args: object, **options: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


def read_torch(data: bytes, source: str) -> object:
    """The content of a file of `torch.save`, its tensors on the CPU, every other object an `Inert`.

    ValueError, naming `source`: it is not a torch file, is damaged or truncated, names anything other than
    tensors and the classes above, or would take more memory than its own size.  In a zip file any changed
    byte of a tensor is noticed (CRC); the older format has no checksum.
    """
    try:
        content = _read_zip(data) if data.startswith(ZIP_MAGIC) else _read_legacy(data)
        for tensor in _tensors(content):
            if max(tensor.nbytes, tensor.untyped_storage().nbytes()) > len(data):
                raise ValueError(f"it holds a tensor {tuple(tensor.shape)} that is larger than the file")
    except Exception as error:  # foreign bytes can raise anything
        raise ValueError(
            f"{source} is not a complete torch file that can be read without running code from it "
            f"(save the state dict alone; in fastai, learn.save(name, with_opt=False)): {error}"
        ) from error
    return content


def read_tokens(data: bytes, source: str) -> list[str]:
    """The words of a pickled list of str, as fastai keeps its vocabulary; ValueError for any other pickle."""
    file = io.BytesIO(data)
    try:
        _check_opcodes(file, _WORDS)
        words = _WordsOnly(file).load()
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"it holds {type(words).__name__} of something else")
    except Exception as error:
        raise ValueError(f"{source} is not a pickled list of words and nothing else: {error}") from error
    return list(words)


def module_state(module: Inert, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a pickled torch module, under the names that its `state_dict()` would give."""
    own = vars(module)
    state = {
        prefix + name: tensor
        for part in ("_parameters", "_buffers")
        for name, tensor in own.get(part, {}).items()
        if isinstance(tensor, Tensor)
    }
    for name, child in own.get("_modules", {}).items():
        if isinstance(child, Inert):
            state |= module_state(child, f"{prefix}{name}.")
    return state


class _WordsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_zip(data: bytes) -> object:
    """torch's format since 1.6: NAME/data.pkl, and the bytes of each storage in NAME/data/KEY."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {m.filename: m for m in file.infolist()}
        if len(members) != len(file.infolist()):
            raise ValueError("it has two members of one name")
        if any(m.compress_type != zipfile.ZIP_STORED for m in members.values()):
            raise ValueError("its members are compressed, which torch.save never does")
        if sum(m.file_size for m in members.values()) > len(data):
            raise ValueError("its members overlap")
        folders = [
            name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)
        ]
        if len(folders) != 1:
            raise ValueError("it is a zip file without a data.pkl")
        folder = folders[0]
        if folder + "byteorder" in members and file.read(folder + "byteorder").decode() != sys.byteorder:
            raise ValueError("it comes from a machine of another byte order")
        storages: dict[str, Tensor] = {}
        content = _TensorsOnly(io.BytesIO(file.read(folder + "data.pkl")), storages, len(data)).load()
        for key, storage in storages.items():
            _fill(storage, key, file.read(f"{folder}data/{key}"))  # read() compares the CRC
    return content


def _fill(storage: Tensor, key: str, content: bytes) -> None:
    if len(content) != storage.nbytes:
        how = "truncated" if len(content) < storage.nbytes else "too long"
        raise ValueError(f"storage {key} is {how}: {len(content):,} of {storage.nbytes:,} bytes")
    if content:
        storage.copy_(torch.frombuffer(bytearray(content), dtype=storage.dtype))


def _stand_in(name: str) -> Callable[..., object]:
    """What a global other than a tensor's becomes: a new class each time, so that files stay apart."""
    if name == "collections.defaultdict":
        return lambda *args: {}
    if not _IGNORED.fullmatch(name):
        raise pickle.UnpicklingError(f"it asks for {name}")
    return type("Inert", (Inert,), {})


def _read_legacy(data: bytes) -> object:
    """torch's format before 1.6: five pickles (magic, version, system, content, keys), then the storages."""
    file = io.BytesIO(data)
    if not data.startswith(LEGACY_MAGIC):
        raise ValueError("it does not begin like one")
    storages: dict[str, Tensor] = {}
    for _ in range(4):  # the last of them is the content
        content = _TensorsOnly(file, storages, len(data)).load()
    missing = dict(storages)
    for key in _TensorsOnly(file, {}, len(data)).load():
        storage = missing.pop(key)
        count = int.from_bytes(file.read(8), "little")
        _fill(storage, key, file.read(count * storage.element_size()))
    if missing:
        raise ValueError(f"{len(missing)} storages are missing")
    return content


class _TensorsOnly(pickle.Unpickler):
    """Knows tensors, and `Inert` for the rest; the bytes of `storages` are filled in later."""

    def __init__(self, file: io.BytesIO, storages: dict[str, Tensor], limit: int) -> None:
        _check_opcodes(file, _OBJECTS)
        super().__init__(file, encoding="utf-8")
        self.storages, self.left = storages, limit

    def find_class(self, module: str, name: str) -> object:
        path = f"{module}.{name}"
        if re.fullmatch(r"torch(\.cuda|\.storage)?\.\w+Storage", path):
            if name.removesuffix("Storage") not in _DTYPES:
                raise pickle.UnpicklingError(f"it holds data of the type {name}")
            return _DTYPES[name.removesuffix("Storage")]
        if path in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return lambda base, offset, size, stride, *rest: base.as_strided(
                size, stride, base.storage_offset() + offset
            )
        if path in _PARAMETERS:
            return lambda tensor, *rest: tensor
        if path == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes
            return lambda rebuild, kind, arguments, state: rebuild(*arguments)
        if path == "torch.Size":
            return lambda sizes: tuple(sizes)
        return OrderedDict if path == "collections.OrderedDict" else _stand_in(path)

    def persistent_load(self, pid: tuple[Any, ...]) -> object:
        if pid[0] == "module":  # with the source of its class, which stays unread
            return pid[1]
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it asks for {kind!r}")
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if count < 0 or self.left < 0:
                raise ValueError("its tensors are larger than the file")
            self.storages[key] = torch.empty(count, dtype=dtype)
        if view and view[0] is not None:
            return self.storages[key].narrow(0, *view[0][1:])
        return self.storages[key]


def _check_opcodes(file: io.BytesIO, allowed: frozenset[str]) -> None:
    """Refuses opcodes that data does not need, before anything of the pickle at `file` is built."""
    start, size = file.tell(), file.getbuffer().nbytes
    for code, argument, _ in pickletools.genops(file):
        if code.name not in allowed:
            raise ValueError(f"it holds {code.name} {'' if argument is None else argument!s:.60}".rstrip())
        # the unpickler would make room for as many
        if code.name == "LONG_BINPUT" and int(argument or 0) > size:
            raise ValueError(f"it numbers an object {argument}")
    file.seek(start)


def _tensors(content: object, depth: int = 0) -> list[Tensor]:
    """The tensors of a state dict, of a learner's file, or of pickled modules."""
    if isinstance(content, Tensor):
        return [content]
    if isinstance(content, Inert):
        content = module_state(content)
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple) and depth < 3:
        return [tensor for part in content for tensor in _tensors(part, depth + 1)]
    return []
