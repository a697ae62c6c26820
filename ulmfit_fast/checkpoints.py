"""Saving and loading without surprises: atomic files, restricted unpickling, messages that name the key."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .extras import need

StateDict = dict[str, Tensor]
PathLike = str | os.PathLike[str]

_HEADER = "ulmfit_fast"  # the one metadata entry of our safetensors files: JSON of {"shared", "metadata"}
_SHOWN = 6  # keys that a message lists before it says how many more there are


@contextlib.contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` once the block is done and it is on disk.

    If the block raises or the disk is full (OSError), the temporary file goes and `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def atomic_write(path: PathLike, data: str | bytes) -> None:
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
    path: PathLike, model: nn.Module | Mapping[str, Tensor], metadata: Mapping | None = None
) -> None:
    """Write a module's state, or a state dict, as safetensors, atomically; shared tensors are written once.

    metadata is any JSON object; `read_model` and `load_model` give it back.
    """
    safetensors = need("safetensors.torch")
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    _check_tensors(state, "model")
    tensors, shared = {}, {}
    for keys in _shared_groups(state):
        tensors[keys[0]] = state[keys[0]].detach().cpu().contiguous().clone()
        shared |= dict.fromkeys(keys[1:], keys[0])
    header = json.dumps({"shared": shared, "metadata": dict(metadata or {})})
    atomic_write(path, safetensors.save(tensors, {"format": "pt", _HEADER: header}))


def read_model(path: PathLike) -> tuple[StateDict, dict]:
    """The tensors, on the CPU, and the metadata of a safetensors file, ours or another program's.

    Raises OSError if it cannot be read, ValueError if it is truncated or no safetensors file.
    """
    safetensors = need("safetensors")
    content = Path(path).read_bytes()
    try:
        state = need("safetensors.torch").load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        ours = json.loads(header.get("__metadata__", {}).get(_HEADER, "{}"))
        state |= {key: state[kept] for key, kept in ours.get("shared", {}).items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    return state, ours.get("metadata", {})


def load_model(path: PathLike, model: nn.Module) -> dict:
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
    problems += [f"missing keys: {_listed(missing)}"] if missing else []
    problems += [f"unexpected keys: {_listed(unexpected)}"] if unexpected else []
    for key, tensor in own.items():
        if key in state and state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)} in the file, {tuple(tensor.shape)} in the model"
            problems.append(f"{key} is {shapes}")
    if problems:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state)


def load_foreign(path: PathLike) -> StateDict:
    """The weights of a .pth/.pt file of fastai 0.7, 1 or 2, or any plain state dict, under fastai 2's keys.

    `learn.save` and `save_encoder` files are both taken; an optimizer beside the model is ignored.  The
    file is unpickled with weights_only=True, so that it cannot run code.  Raises OSError if it cannot be
    read, ValueError if it is truncated or holds something else.  Give the result to `load_state`, through
    `encoder_state` where only the encoder is wanted.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        with torch.serialization.safe_globals(_optimizer_globals()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can raise anything in the unpickler
        raise ValueError(
            f"{path} is not a complete torch file that can be read without running code from it "
            f"(save the state dict alone; in fastai, learn.save(name, with_opt=False)): {error}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    _check_tensors(content, str(path))
    return _fastai2_keys(content)


def encoder_state(state: Mapping[str, Tensor]) -> StateDict:
    """The encoder's part, under its own keys, of the state of a language model, classifier or encoder."""
    for prefix in ("0.module.", "0."):
        part = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
        if part:
            return part
    return dict(state)


class _IgnoredList:
    """Stands in for fastcore's list, which fastai's optimizer state holds, so that fastcore is not needed."""


def _optimizer_globals() -> list:
    """What the optimizer state in a `learn.save` file is made of beside tensors; none of it runs code."""
    scalar = np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar
    types = {type(np.dtype(name)) for name in ("float32", "float64", "int64")}
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    return [(_IgnoredList, "fastcore.foundation.L"), *((scalar, name) for name in names), np.dtype, *types]


def _fastai2_keys(state: Mapping[str, Tensor]) -> StateDict:
    """Rename fastai 0.7's keys and leave out the dropped copy of the recurrent weight that fastai 1 saves."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"encoder_with_dropout\.embed\.weight$", "encoder_dp.emb.weight", key)
        key = re.sub(r"(rnns\.\d+)\.module\.weight_hh_l0_raw$", r"\1.weight_hh_l0_raw", key)
        renamed[key] = tensor

    def is_copy(key: str) -> bool:
        raw = re.sub(r"(rnns\.\d+)\.module\.weight_hh_l0$", r"\1.weight_hh_l0_raw", key)
        return raw != key and raw in renamed

    return {key: tensor for key, tensor in renamed.items() if not is_copy(key)}


def _shared_groups(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The keys, those of one and the same tensor together, in the order of the first of each."""
    groups: dict[tuple, list[str]] = {}
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
        raise ValueError(f"{source} must map names to tensors only, but holds {_listed(others)}")


def _listed(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
