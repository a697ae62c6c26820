"""What a model starts from: the frequencies of words, or the rows of another vocabulary."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch

from .archives import is_address
from .batches import Docs
from .config import ModelConfig
from .locks import holder
from .model import LanguageModel
from .pretrained import Checkpoint, load_checkpoint
from .results import TrainedLM
from .runs import CONFIG, LOCK, as_directory, read_config
from .text import own_names


def start_from_frequencies(model: LanguageModel, docs: Docs) -> None:
    """Sets the decoder's bias to the log of each word's share of `docs`, arrays of indices.

    The tied embedding then need not learn how frequent words are. Otherwise Adam, which makes steps of one
    size whatever the gradient's, moves all rare words along one direction, until that is most of what their
    rows hold.
    """
    counts = torch.from_numpy(np.bincount(np.concatenate(docs), minlength=len(model[1].decoder.bias))) + 1
    with torch.no_grad():
        model[1].decoder.bias.copy_((counts / counts.sum()).log())


def starting_point(
    run: object, argument: str, backwards: bool | None = None, decoder: bool = True
) -> tuple[Checkpoint, list[str], ModelConfig, str]:
    """(Checkpoint, its words, ModelConfig, preset) of what a stage starts from.

    The words have this library's markers, and the Checkpoint's `backwards` is a bool.

    run: a run directory of stage 1 or 2, a TrainedLM, a Checkpoint, or whatever `load_checkpoint` opens: a
    path or a URL. argument: its name in messages. backwards: see `direction`. decoder: whether a language
    model's is needed.
    """
    preset = "ulmfit"
    if isinstance(run, Checkpoint):
        start = run
    elif isinstance(run, str | Path) and (is_address(run) or Path(run).is_file()):
        start = load_checkpoint(run)
    else:
        start, preset = _of_run(run, argument)
    if start.tokens is None:
        why = "".join(f" ({note})" for note in start.notes)
        raise ValueError(
            f"{argument}={start.source!r} does not say its words{why}: give "
            "load_checkpoint(path, tokens=...) with the words or the path of their pickle"
        )
    if decoder and start.kind != "language model":
        raise ValueError(
            f"{argument}={start.source!r} must be a language model's, it is of kind {start.kind!r}"
        )
    sizes = start.config
    if sizes["bidir"]:
        raise ValueError(f"{argument}={start.source!r} is bidirectional; the stages train in one direction")
    words, backwards = own_names(start.tokens), direction(start, argument, backwards)
    start = start.with_bias()  # the stages train one
    start = dataclasses.replace(start, tokens=words, backwards=backwards)
    return start, words, ModelConfig(sizes["emb_sz"], sizes["n_hid"], sizes["n_layers"]), preset


def direction(start: Checkpoint, argument: str, backwards: bool | None) -> bool:
    """Whether the model of a Checkpoint reads texts backwards.

    A run directory and a file of `save_checkpoint` say it, and `backwards` may not contradict (ValueError).
    Of another file `backwards` says it; where that is None, the file's name: one with "bwd" in it, as
    fastai's wt103-bwd.tgz, is of a backward model. argument: the checkpoint's name in messages.
    """
    if backwards is None or backwards == start.backwards:
        return bool(start.direction)
    if start.backwards is not None:
        raise ValueError(
            f"backwards={backwards} contradicts {argument}={start.source!r}, whose model reads "
            f"{way(start.backwards)}: leave it out, or give {start.backwards}"
        )
    return backwards


def way(backwards: bool | None) -> str:
    return "backwards" if backwards else "forwards"


def check_direction(backwards: object) -> bool | None:
    """`backwards` as None or a bool of Python; TypeError unless it is one of them, or NumPy's bool."""
    if backwards is None or isinstance(backwards, (bool, np.bool_)):
        return None if backwards is None else bool(backwards)
    raise TypeError(f"backwards must be True, False or None, got {backwards!r} ({type(backwards).__name__})")


def _of_run(run: object, argument: str) -> tuple[Checkpoint, str]:
    """(Checkpoint, preset) of a finished run directory of stage 1 or 2, or of its TrainedLM."""
    if not isinstance(run, str | os.PathLike | TrainedLM):
        raise TypeError(
            f"{argument} must be a run directory, the path or URL of a checkpoint, a TrainedLM or a "
            f"Checkpoint, got {type(run).__name__}"
        )
    path = run.path if isinstance(run, TrainedLM) else as_directory(run, argument)
    if path is None or (isinstance(run, TrainedLM) and not (path / CONFIG).exists()):
        where = "has no run directory" if path is None else f"is the run in {str(path)!r}, which is not there"
        raise FileNotFoundError(
            f"{argument} {where}: give the path of its directory, or of a file that save_checkpoint makes"
        )
    record = read_config(path, argument)
    if record["stage"] == "classify":
        raise ValueError(f"{argument}={str(path)!r} holds a classifier; a run of stage 1 or 2 is needed here")
    if not record["finished"]:
        if running := holder(path / LOCK):
            raise ValueError(f"{argument}={str(path)!r} is in progress: {running} is training there")
        raise ValueError(f"{argument}={str(path)!r} has not finished; go on with it (resume=True) first")
    if isinstance(run, TrainedLM):
        state, words = {key: t.cpu() for key, t in run.model.state_dict().items()}, run.tokenizer.itos
        start = Checkpoint(str(path), "ulmfit_fast", state, words, backwards=run.backwards)
        return start, record["preset"]
    return load_checkpoint(path), record["preset"]
