"""From the initial model of a stage to its finished run, for the language model and for the classifier."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Docs, DocumentBatches, epoch_stream
from .config import FinetuneConfig, PretrainConfig, check_flag
from .corpus import Label
from .devices import pick_device, to_device
from .encoder import Hidden
from .extras import check_train_extras
from .graphed import Batch, Figures
from .history import Line, perplexity
from .loop import Between, Loop, Validate
from .model import LanguageModel, TextClassifier, layer_groups
from .progress import Show, announce, check_show
from .results import TrainedClassifier, TrainedLM, document_logits, load, stream_loss
from .schedules import Phase, gradual_unfreezing_plan
from .team import Directory, Team
from .text import Tokenizer

_Trained = TypeVar("_Trained", TrainedLM, TrainedClassifier)
Callback = Callable[[Line], object] | None
Labelled = tuple[list[str], list[Label]]


class Job(NamedTuple):
    """What a stage needs besides its model and data: processes, run directory, progress, callback."""

    team: Team
    run: Directory
    progress: Show
    callback: Callback

    @property
    def device(self) -> torch.device:
        return self.team.device


def fit_classifier(
    job: Job,
    record: dict[str, Any],
    model: TextClassifier,
    tokenizer: Tokenizer,
    texts: list[str],
    labels: list[Label],
    held_out: Labelled | None,
) -> TrainedClassifier:
    """Stage 3 from the initial model on. held_out: (texts, labels) or None."""
    config, classes, device = record["config"], record["classes"], job.device
    model.to(device)
    groups, docs = layer_groups(model), tokenizer.encode(texts)
    index = {c: i for i, c in enumerate(classes)}
    targets = [index[label] for label in labels]

    def measures(logits: Tensor, wanted: Tensor) -> Figures:
        return {
            "loss": F.cross_entropy(logits, wanted),
            "accuracy": (logits.argmax(1) == wanted).double().mean(),
        }

    def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        ids, lengths, wanted = batch
        wanted = to_device(wanted, device)
        logits = model(to_device(ids, device), lengths).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=config.label_smoothing)
        return loss, measures(logits, wanted)

    validate: Validate | None = None
    if held_out:
        documents = tokenizer.encode(held_out[0])
        answers = torch.tensor([index[label] for label in held_out[1]], device="cpu")

        def validate(between: Between) -> dict[str, float]:
            logits = document_logits(model, documents, len(classes), 2 * config.batch_size, between)
            return {name: float(value) for name, value in measures(logits, answers).items()}

    with job.run.begin(record, tokenizer) as state:
        Loop(
            model,
            groups,
            gradual_unfreezing_plan(config.epochs, len(groups), config.gradual_unfreezing),
            config,
            job.run,
            team=job.team,
            batches=lambda epoch: DocumentBatches(docs, targets, config.batch_size, config.seed, epoch),
            loss_of=loss_of,
            tokens_of=lambda batch: int(batch[1].sum()),
            validate=validate,
            title="classifier",
            progress=job.progress,
            callback=job.callback,
        ).train(state)
    return TrainedClassifier(model, tokenizer, config, classes, job.run.path, job.run.history())


def fit_lm(
    job: Job,
    record: dict[str, Any],
    model: LanguageModel,
    tokenizer: Tokenizer,
    docs: Docs,
    held_out: list[str] | None,
    plan: list[Phase],
) -> TrainedLM:
    """Stages 1 and 2 from the initial model on. docs: arrays of indices; held_out: texts or None."""
    config, finetune, device = record["config"], record["stage"] == "finetune", job.device
    shuffle = finetune and config.shuffle_texts
    epoch_stream(
        docs, config.batch_size, config.bptt, config.seed, 0, shuffle
    )  # raises here if the text is too short
    valid_docs = tokenizer.encode(held_out) if held_out else []
    if valid_docs and sum(map(len, valid_docs)) < 2:
        raise ValueError("valid is too short: 1 token, a perplexity needs at least 2")
    model.to(device)

    def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        ids, targets = (to_device(x, device) for x in batch)
        loss, entropy = model(ids, targets, alpha=config.alpha, beta=config.beta)
        return loss, {"loss": entropy}

    def validate(between: Between) -> dict[str, float]:
        loss = stream_loss(model, valid_docs, config.batch_size, config.bptt, between)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def set_hidden(hidden: Hidden) -> None:
        model[0].hidden = hidden
        model[0].bs = hidden[0][0].shape[1]

    with job.run.begin(record, tokenizer) as state:
        Loop(
            model,
            layer_groups(model),
            plan,
            config,
            job.run,
            team=job.team,
            batches=lambda epoch: epoch_stream(
                docs, config.batch_size, config.bptt, config.seed, epoch, shuffle
            ),
            loss_of=loss_of,
            tokens_of=lambda batch: batch[0].numel(),
            validate=validate if valid_docs else None,
            validate_first=finetune and bool(valid_docs),
            before_epoch=model.reset,
            get_hidden=lambda: model[0].hidden,
            set_hidden=set_hidden,
            title="fine-tuning" if finetune else "pre-training",
            progress=job.progress,
            callback=job.callback,
        ).train(state)
    model.reset()
    return TrainedLM(model, tokenizer, config, job.run.path, job.run.history())


def finished(job: Job, kind: type[_Trained]) -> _Trained:
    """The run that `job.run.holds_finished` has found, and compared with the stage's record."""
    result = load(job.run.path, job.device)
    assert isinstance(result, kind)
    return result


def prepare(
    out: str | os.PathLike[str],
    resume: bool,
    overwrite: bool,
    device: str | torch.device | None,
    progress: Show,
    callback: Callback,
) -> Job:
    """Validates the arguments that all stages share, before a base model or a text is read, and returns the
    Job.
    """
    check_train_extras()
    check_show(progress)
    check_flag("resume", resume)
    check_flag("overwrite", overwrite)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be None or a function that takes a metrics line, got {callback!r}")
    team = Team(pick_device(device))
    run = team.directory(out, resume, overwrite)
    return Job(team, run, progress if team.is_first else False, callback)


def check_cuda_graph(config: PretrainConfig | FinetuneConfig, team: Team) -> None:
    if config.cuda_graph and team.device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, got device={str(team.device)!r}")
    if config.cuda_graph and team.size > 1:
        raise ValueError(f"cuda_graph=True works in one process only, and {team.size} train here")


# torch's default generators are the whole process's: were two threads to train at once, the numbers of each
# would depend on the other. A training that a callback starts is within the one that calls it, and may go on.
_one_thread = threading.RLock()


def _after_fork() -> None:
    """A fork has only the thread that forked: what another one holds would stay locked."""
    global _one_thread
    if not _one_thread.acquire(blocking=False):
        _one_thread = threading.RLock()
    else:
        _one_thread.release()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def own_randomness(seed: int, job: Job) -> Iterator[None]:
    """Seeds torch's default generators inside the block, and restores the caller's state after it. Waits
    while another thread is in such a block.
    """
    lock = _one_thread
    if not lock.acquire(blocking=False):
        announce(f"{job.run.path} waits: another thread of this process is training", job.progress)
        lock.acquire()
    try:
        with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        lock.release()
