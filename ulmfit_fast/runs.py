"""A run directory: what is in it, how it is written so that nothing saved is lost, and how it is opened
again.

config.json        stage, sizes, hyper-parameters, classes, whether the run has finished
tokenizer.json     words and their indices
model.safetensors  the weights, as of the last epoch end
metrics.jsonl      one line per logged step and per validation
curves.png         the same as a picture
state.pt           while the run is unfinished: all that is needed to go on with the same numbers
"""

import io
import json
import pathlib

import torch

from .checkpoints import atomic_write, load_model, save_model
from .config import STAGES, ModelConfig, unknown_key_message

FORMAT = 1
CONFIG, TOKENIZER, MODEL, METRICS = "config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl"
CURVES, STATE = "curves.png", "state.pt"


def as_directory(path, argument):
    """`path` as a pathlib.Path; TypeError for anything that is none."""
    try:
        return pathlib.Path(path)
    except TypeError:
        raise TypeError(
            f"{argument} must be the path of a run directory, got {type(path).__name__}"
        ) from None


def read_config(path, argument="run_dir"):
    """The contents of config.json in `path`, checked; "config" becomes the stage's dataclass, "model" a
    ModelConfig.
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
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
        record["finished"], record["preset"], record["classes"]  # noqa: B018  (a missing key raises here)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} does not describe a run of ulmfit_fast: {error}") from None
    return record


class RunDirectory:
    """The directory of one training run, for writing.

    A directory that holds a run is refused unless `overwrite` (start anew) or `resume` (go on; a finished run
    is then left as it is, `finished` says so, and an empty directory starts from the beginning).
    """

    def __init__(self, path, resume=False, overwrite=False):
        self.path = as_directory(path, "out")
        if resume and overwrite:
            raise ValueError("resume=True and overwrite=True contradict each other")
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out={str(path)!r} is a file; a run needs a directory of its own")
        self.finished = False
        self._lines = 0
        if (self.path / CONFIG).exists():
            record = read_config(self.path, "out")
            if not (resume or overwrite):
                state = "a finished" if record["finished"] else "an interrupted"
                more = "" if record["finished"] else "resume=True goes on with it, "
                raise FileExistsError(
                    f"out={str(path)!r} holds {state} {record['stage']} run: {more}overwrite=True "
                    "replaces it, or choose another directory"
                )
            self.finished = resume and record["finished"]

    def begin(self, record, tokenizer, resume):
        """Writes config.json and tokenizer.json, or with `resume` compares them; returns the state to go on
        from.

        record: stage, preset, model (ModelConfig), config (the stage's dataclass), classes.
        """
        self.record = {"format": FORMAT, **record, "finished": False}
        if resume and (self.path / STATE).exists():
            self._compare(read_config(self.path, "out"))
            return self._read_state()
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (STATE, METRICS):
            (self.path / name).unlink(missing_ok=True)
        self._write(TOKENIZER, tokenizer.to_json().encode())
        self._write_config()
        return None

    def _compare(self, old):
        if old["stage"] != self.record["stage"]:
            raise ValueError(
                f"out={str(self.path)!r} holds a run of stage {old['stage']!r}, not "
                f"{self.record['stage']!r}: it cannot be resumed here"
            )
        for part in ("config", "model"):
            before, now = old[part].to_dict(), self.record[part].to_dict()
            changed = [f"{k}={now[k]!r} (was {before[k]!r})" for k in now if now[k] != before[k]]
            if changed:
                raise ValueError(
                    f"resume needs the options the run was started with; changed: {', '.join(changed)}"
                )

    def _read_state(self):
        try:
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # torch raises RuntimeError, EOFError or UnpicklingError for a damaged file
            raise ValueError(
                f"{str(self.path / STATE)!r} cannot be read ({str(error).splitlines()[0]}); "
                "overwrite=True starts anew"
            ) from None

    def _write(self, name, data):
        atomic_write(self.path / name, data)

    def _write_config(self):
        plain = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in self.record.items()}
        self._write(CONFIG, (json.dumps(plain, indent=2) + "\n").encode())

    def save_state(self, state):
        """Replaces state.pt as a whole. state: dicts, lists, numbers and tensors."""
        buffer = io.BytesIO()
        torch.save({**state, "metric_lines": self._lines}, buffer)
        self._write(STATE, buffer.getbuffer())

    def save_model(self, model):
        save_model(self.path / MODEL, model)

    def finish(self, model):
        """The final weights; then config.json says finished, and state.pt goes."""
        self.save_model(model)
        self.record["finished"] = True
        self._write_config()
        (self.path / STATE).unlink(missing_ok=True)

    def log(self, line):
        """Appends one metrics line (a dict)."""
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines += 1

    def keep_lines(self, n):
        """Drops the metrics lines written after the state that is resumed."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:n] if file.exists() else []
        self._write(METRICS, "".join(lines).encode())
        self._lines = len(lines)

    def history(self):
        return read_history(self.path)

    def plot(self):
        """Draws curves.png from metrics.jsonl."""
        from .plots import curves

        self._write(CURVES, curves(self.history(), self.record["stage"]))


def read_history(path):
    """All lines of metrics.jsonl as dicts; none when there is no such file."""
    file = pathlib.Path(path) / METRICS
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def load_weights(model, path):
    """Loads model.safetensors of the run at `path` into `model`."""
    file = pathlib.Path(path) / MODEL
    if not file.exists():
        raise FileNotFoundError(
            f"{str(path)!r} has no {MODEL} yet: the run stopped before its first epoch ended"
        )
    load_model(file, model)
