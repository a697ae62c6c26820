"""Files of our own, without surprises: atomic, checked, with messages that name the key."""

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .extras import need

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]

_HEADER = (
    "ulmfit_fast"  # the metadata entry of our safetensors files: JSON of {"shared", "metadata", "crc32"}
)
_SHOWN = 6  # keys that a message lists before it says how many more there are


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` once the block is done and it is on disk.

    If the block raises or the disk is full (OSError), the temporary file goes and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other threads save there too
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            if str(error.filename) == str(temporary):
                error.filename = str(path)
                del error.filename2  # what a rename was to make of it; set to None it would be shown
            name_file(error, path)
        raise
    _sync_directory(path.parent)


def name_file(error: OSError, path: PathLike) -> None:
    """Adds the file's name to an error that has none, such as that of a write to a full disk."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` before the system's errors, which keep their errno. Ours have none, and name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        file = f": {str(error.filename)!r}" if error.filename else ""
        named = type(error)(f"{where} cannot be used: {error.strerror}{file}")
        named.errno = error.errno
        raise named from None


def atomic_write(path: PathLike, data: str | bytes | memoryview) -> None:
    """Write text (as UTF-8) or bytes to `path` such that it holds either all of it or what it held before."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def _sync_directory(directory: Path) -> None:
    """Make a rename in it last through a power cut, where the system lets directories be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_model(
    path: PathLike, model: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a module's state, or a state dict, as safetensors, atomically; shared tensors are written once.

    metadata is any JSON object; `read_model` and `load_model` give it back.  A CRC over names, data and
    metadata is stored with them, which safetensors itself lacks.
    """
    safetensors = need("safetensors.torch")
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    _check_tensors(state, "model")
    tensors: StateDict = {}
    shared: dict[str, str] = {}
    for keys in _shared_groups(state):
        tensors[keys[0]] = state[keys[0]].detach().cpu().contiguous().clone()
        shared |= dict.fromkeys(keys[1:], keys[0])
    header: dict[str, Any] = {"shared": shared, "metadata": dict(metadata or {})}
    header["crc32"] = _crc32(tensors, header)
    # one entry: of several, safetensors draws the order anew in each process
    atomic_write(path, safetensors.save(tensors, {_HEADER: json.dumps(header, sort_keys=True)}))


def read_model(path: PathLike) -> tuple[StateDict, dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a safetensors file, ours or another program's.

    Raises OSError if it cannot be read, ValueError if it is truncated or not a safetensors file, or, in a
    file of ours, if a byte of it has changed.
    """
    safetensors = need("safetensors")
    content = Path(path).read_bytes()
    try:
        state = need("safetensors.torch").load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        ours = json.loads(header.get("__metadata__", {}).get(_HEADER, "{}"))
        if unknown := ours.keys() - {"shared", "metadata", "crc32"}:
            raise ValueError(f"its header holds {listed(unknown)}")
        if "crc32" in ours and ours.pop("crc32") != _crc32(state, ours):
            raise ValueError("its bytes are not those that were written (CRC)")
        state |= {key: state[kept] for key, kept in ours.get("shared", {}).items()}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    metadata = ours.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} must hold a JSON object as metadata, got {type(metadata).__name__}")
    return state, metadata


def _crc32(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        crc = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def load_model(path: PathLike, model: nn.Module) -> dict[str, Any]:
    """Load a safetensors file into `model` (`load_state` says how strictly) and return its metadata."""
    state, metadata = read_model(path)
    load_state(model, state, source=str(path))
    return metadata


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "the state dict") -> None:
    """Copy `state` into `model`, or raise ValueError and change nothing.

    Every key of the model must be there with its shape, and no other; of keys that share a tensor in the
    model one is enough, and those given must be equal.  The message lists what is missing, unexpected or
    of another shape.
    """
    own = model.state_dict(keep_vars=True)
    _check_tensors(state, source)
    state = dict(state)
    problems = []
    for keys in _shared_groups(own):
        given = [key for key in keys if key in state]
        if given:
            state |= {key: state[given[0]] for key in keys if key not in state}
        for key in given[1:]:
            if not _equal(state[key], state[given[0]]):
                problems.append(f"{key} and {given[0]} are one tensor in the model, but differ in the file")
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    problems += [f"missing keys: {listed(missing)}"] if missing else []
    problems += [f"unexpected keys: {listed(unexpected)}"] if unexpected else []
    for key, tensor in own.items():
        if key in state and state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)} in the file, {tuple(tensor.shape)} in the model"
            problems.append(f"{key} is {shapes}")
    if problems:
        problems = _sizes_that_differ(state, own) + problems
        raise ValueError(f"{source} does not fit this {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state)


def _sizes_that_differ(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The usual causes in words: another vocabulary, or 1150 hidden units instead of 1152."""
    sizes = (
        ("words", "encoder.weight", 0),
        ("embedding features", "encoder.weight", 1),
        ("hidden units", "rnns.0.weight_hh_l0_raw", 1),
    )
    return [
        f"{state[key].shape[dim]} {what} in the file, {own[key].shape[dim]} in the model"
        for what, suffix, dim in sizes
        for key in own
        if key in ("0.module." + suffix, "0." + suffix, suffix) and key in state
        if state[key].dim() == 2 and state[key].shape[dim] != own[key].shape[dim]
    ]


def _shared_groups(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The keys, those of one and the same tensor together, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in state.items():
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        # empty and meta tensors have no address to tell them apart
        own = (key,) if tensor.numel() == 0 or tensor.is_meta else view
        groups.setdefault(own, []).append(key)
    return list(groups.values())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a.dtype)))


def _check_tensors(state: Mapping[str, object], source: str) -> None:
    others = [f"{key} ({type(x).__name__})" for key, x in state.items() if not isinstance(x, Tensor)]
    if others:
        raise ValueError(f"{source} must map names to tensors only, but holds {listed(others)}")


def listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
