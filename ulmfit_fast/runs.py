"""A run directory: what is in it, how it is written so that nothing saved is lost, and how it is opened
again.

config.json        stage, sizes, direction, hyper-parameters, classes, a hash of the data, whether the run has
                   finished
tokenizer.json     words and their indices
model.safetensors  the weights, as of the last epoch end
metrics.jsonl      one line per logged step ("kind": "train"), epoch ("epoch") and validation ("valid");
                   what is infinite or NaN is null
curves.png         the same as a picture
state.pt           while the run is unfinished: all that is needed to continue with the same results
.lock              while a process trains there: its process id
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import history
from .checkpoints import atomic_write, load_model, name_file, naming, save_model
from .config import STAGES, ModelConfig, unknown_key_message
from .locks import holder, in_use, locked
from .text import Tokenizer

FORMAT, STATE_FORMAT = 1, 3
CONFIG, TOKENIZER, MODEL, METRICS = "config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl"
CURVES, STATE, LOCK = "curves.png", "state.pt", ".lock"
FILES = (CONFIG, TOKENIZER, MODEL, METRICS, CURVES, STATE)


def as_directory(path: str | os.PathLike[str], argument: str) -> pathlib.Path:
    """`path` as a Path; TypeError if it is none, ValueError if it is empty: that is the current folder."""
    wanted = f"{argument} must be the path of a run directory"
    try:
        directory = pathlib.Path(path)
    except TypeError:
        raise TypeError(f"{wanted}, got {type(path).__name__}") from None
    if os.fspath(path) == "" or "\0" in str(directory):
        raise ValueError(f"{wanted}, got {path!r}")
    return directory


def fingerprint(*data: Any) -> str:
    """A hash of what a run learns from: dicts of tensors, lists and other values that JSON has."""
    digest = hashlib.sha256()
    for part in data:
        digest.update(b"[")
        if isinstance(part, dict):
            for name, tensor in part.items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
            continue
        for item in part if isinstance(part, list) else [part]:
            digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def read_config(path: str | os.PathLike[str], argument: str = "run_dir") -> dict[str, Any]:
    """The contents of config.json in `path`, checked; "config" becomes the stage's dataclass, "model" a
    ModelConfig. Without "backwards" it is False: earlier versions read forwards alone.
    """
    file = as_directory(path, argument) / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{argument}={str(path)!r} is no run directory: it has no {CONFIG}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        stage = record["stage"]
        if stage not in STAGES:
            raise ValueError(unknown_key_message("stage", stage, STAGES))
        record["config"] = STAGES[stage].from_dict(record["config"])
        record["model"] = ModelConfig.from_dict(record["model"])
        said = getattr(record["config"], "backwards", None)  # stage 1 has it as an option too
        if not isinstance(record.setdefault("backwards", said or False), bool):
            raise ValueError(f"backwards must be true or false, got {record['backwards']!r}")
        if said not in (None, record["backwards"]):
            raise ValueError(f"backwards is {record['backwards']}, and {said} in config")
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
        record["finished"], record["preset"], record["classes"]  # noqa: B018  (a missing key raises here)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} does not describe a run of ulmfit_fast: {error}") from None
    return record


class RunDirectory:
    """The directory of one training run, for writing.

    A directory that holds a run is refused unless `overwrite` (start anew) or `resume` (go on; an empty
    directory starts from the beginning). One that is not a run's, but has files of these names, is
    always refused.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.resume, self.overwrite = as_directory(path, "out"), resume, overwrite
        if resume and overwrite:
            raise ValueError("resume=True and overwrite=True contradict each other")
        self._lines = 0
        # another process may hold the lock of a finished run too, to draw its curves
        if (process := holder(self.path / LOCK)) and not (resume and self._is_finished()):
            raise BlockingIOError(in_use(self._where, process))
        with naming(self._where):
            if not self._is_finished():
                _try_to_write(self.path)

    def _is_finished(self) -> bool:
        old = self._existing()
        return bool(old and old["finished"])

    @property
    def _where(self) -> str:
        return f"out={str(self.path)!r}"

    def _existing(self) -> dict[str, Any] | None:
        """What config.json says of the run that `resume` finds, or None; an error if `path` must stay."""
        where = self._where
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{where} is a file; a run needs a directory of its own")
        if not _is_ours(self.path / CONFIG):
            others = [name for name in FILES if (self.path / name).exists()]
            if others:
                raise FileExistsError(
                    f"{where} is no run directory, but has {', '.join(others)}, which a run would replace; "
                    "choose another directory"
                )
            return None
        if self.overwrite:
            return None
        record = read_config(self.path, "out")
        if not self.resume:
            state = "a finished" if record["finished"] else "an interrupted"
            more = "" if record["finished"] else "resume=True goes on with it, "
            raise FileExistsError(
                f"{where} holds {state} {record['stage']} run: {more}overwrite=True replaces it, or choose "
                "another directory"
            )
        return record

    def holds_finished(self, record: dict[str, Any]) -> bool:
        """Whether `resume` finds the run that `record` describes, finished; ValueError if it is another run.

        record: stage, preset, model (ModelConfig), backwards, config (the stage's dataclass), classes, data
        (a hash).
        """
        old = self._compared(record)
        if old is None or not old["finished"]:
            return False
        self._complete(old)
        return True

    def _compared(self, record: dict[str, Any]) -> dict[str, Any] | None:
        old = self._existing()
        if old is not None:
            self._compare(old, record)
        return old

    def _complete(self, record: dict[str, Any]) -> None:
        """Tidies up a finished run whose process was killed before it could: state, lock, curves."""
        state, lock, curves = ((self.path / name).exists() for name in (STATE, LOCK, CURVES))
        if (curves and not state and not lock) or not os.access(self.path, os.W_OK):
            return
        # the run is whole without it: a full disk, or a process that does the same, is no reason to fail
        with contextlib.suppress(OSError), locked(self.path / LOCK, self._where):
            (self.path / STATE).unlink(missing_ok=True)
            if not curves:
                self.record = record
                self.plot()

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        where = self._where
        if old["stage"] != new["stage"]:
            raise ValueError(
                f"{where} holds a run of stage {old['stage']!r}, not {new['stage']!r}: it cannot be resumed "
                "here"
            )
        before, now = _options(old), _options(new)
        changed = [f"{k}={now[k]!r} (was {before[k]!r})" for k in now if now[k] != before[k]]
        if changed:
            raise ValueError(
                f"resume needs the options the run in {where} was started with; changed: {', '.join(changed)}"
            )
        if old.get("data", new["data"]) != new["data"]:  # runs of earlier versions do not say
            raise ValueError(
                f"resume needs the texts, labels, validation set and base model the run in {where} was "
                "started with; these are others"
            )

    @contextlib.contextmanager
    def begin(self, record: dict[str, Any], tokenizer: Tokenizer) -> Iterator[dict[str, Any] | None]:
        """Holds the directory and yields the state to go on from, or None where the run begins.

        A new run first removes what is left of an earlier one, whose weights would be loaded under the new
        options. record: as for `holds_finished`.
        """
        self.record = {"format": FORMAT, **record, "finished": False}
        with naming(self._where):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / LOCK, self._where):
            old = self._compared(record)
            if old and old["finished"]:
                raise FileExistsError(f"the run in {self._where} has just been finished elsewhere")
            for name in FILES:  # left by a process that was killed while it wrote
                for remains in self.path.glob(f".{name}.*.tmp"):
                    remains.unlink()
            if self.resume and (self.path / STATE).exists():
                yield self._read_state()
                return
            for name in (MODEL, STATE, METRICS, CURVES):
                (self.path / name).unlink(missing_ok=True)
            self._write_config()
            self._write(TOKENIZER, tokenizer.to_json().encode())
            yield None

    def _read_state(self) -> dict[str, Any]:
        file = self.path / STATE
        try:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch does not look at the checksums
                    raise ValueError(f"the checksum of {damaged} differs")
            state = torch.load(file, map_location="cpu", weights_only=True)
            if state.get("format") != STATE_FORMAT:
                raise ValueError("another version of ulmfit_fast saved it")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of many types for a damaged file, torch's and zipfile's
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{str(file)!r} cannot be read ({reason}); overwrite=True starts anew") from None
        return state

    def _write(self, name: str, data: bytes | memoryview) -> None:
        atomic_write(self.path / name, data)

    def _write_config(self) -> None:
        plain = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in self.record.items()}
        self._write(CONFIG, (json.dumps(plain, indent=2) + "\n").encode())

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces state.pt as a whole. state: dicts, lists, numbers and tensors."""
        buffer = io.BytesIO()
        torch.save({**state, "format": STATE_FORMAT, "metric_lines": self._lines}, buffer)
        self._write(STATE, buffer.getbuffer())

    def save_model(self, model: nn.Module) -> None:
        save_model(self.path / MODEL, model)

    def finish(self, model: nn.Module) -> None:
        """The final weights; then config.json says finished, and state.pt goes."""
        self.save_model(model)
        self.record["finished"] = True
        self._write_config()
        (self.path / STATE).unlink(missing_ok=True)

    def log(self, line: dict[str, Any]) -> None:
        """Appends one metrics line (a dict), or nothing where the disk is full (OSError)."""
        file = self.path / METRICS
        size = file.stat().st_size if file.exists() else 0
        try:
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(history.as_json(line) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(file, size)
            name_file(error, file)
            raise
        self._lines += 1

    def keep_lines(self, n: int) -> None:
        """Drops the metrics lines written after the state that is resumed."""
        file = self.path / METRICS
        lines = file.read_bytes().splitlines(keepends=True)[:n] if file.exists() else []
        self._write(METRICS, b"".join(lines))
        self._lines = len(lines)

    def history(self) -> list[dict[str, Any]]:
        return read_history(self.path)

    def plot(self) -> None:
        """Draws curves.png from metrics.jsonl; where that fails, a warning says why."""
        try:
            from .plots import curves

            self._write(CURVES, curves(self.history(), self.record["stage"]))
        except Exception as error:  # a picture is no reason to lose a run, whatever matplotlib raises
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{str(self.path / CURVES)!r} could not be drawn: {reason}", stacklevel=2)


def _try_to_write(path: pathlib.Path) -> None:
    """OSError if a file cannot be written in `path`, or in the folder in which it would be made. A trial
    tells more than the permissions: a disk may be mounted for reading.
    """
    there = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        error.filename = str(there)
        raise


def _options(record: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters, sizes and direction of a record in one dict."""
    return {**record["config"].to_dict(), **record["model"].to_dict(), "backwards": record["backwards"]}


def _is_ours(config: pathlib.Path) -> bool:
    """Whether a config.json is that of a run. A damaged one counts as such, another program's does not."""
    if not config.exists():
        return False
    try:
        content = json.loads(config.read_bytes())
    except ValueError:
        return True
    return isinstance(content, dict) and bool({"format", "stage"} & content.keys())


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl in the run directory `path`; see history.read_history."""
    return history.read_history(pathlib.Path(path) / METRICS)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads model.safetensors of the run at `path` into `model`."""
    file = pathlib.Path(path) / MODEL
    if not file.exists():
        raise FileNotFoundError(
            f"{str(path)!r} has no {MODEL} yet: the run stopped before its first epoch ended"
        )
    load_model(file, model)
