"""From the initial model of a stage to its finished run, for the language model and for the classifier."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .batches import DocumentBatches, epoch_stream
from .devices import pick_device, to_device
from .extras import check_train_extras
from .loop import Loop
from .model import layer_groups
from .progress import check_show
from .results import TrainedClassifier, TrainedLM, document_logits, stream_loss
from .runs import RunDirectory
from .schedules import gradual_unfreezing_plan
from .team import Team

Show = bool | Literal["lines"] | None
Callback = Callable[[dict[str, Any]], object] | None


class Job(NamedTuple):
    """What a stage needs besides its model and data: processes, run directory, progress, callback."""

    team: Team
    run: RunDirectory
    progress: Show
    callback: Callback

    @property
    def device(self) -> torch.device:
        return self.team.device


def fit_classifier(job, record, model, tokenizer, texts, labels, held_out):
    """Stage 3 from the initial model on. held_out: (texts, labels) or None."""
    config, classes, device = record["config"], record["classes"], job.device
    model.to(device)
    groups, docs = layer_groups(model), tokenizer.encode(texts)
    index = {c: i for i, c in enumerate(classes)}
    targets = [index[label] for label in labels]

    def measures(logits, wanted):
        return {
            "loss": F.cross_entropy(logits, wanted),
            "accuracy": (logits.argmax(1) == wanted).double().mean(),
        }

    def loss_of(model, batch):
        ids, lengths, wanted = batch
        wanted = to_device(wanted, device)
        logits = model(to_device(ids, device), lengths).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=config.label_smoothing)
        return loss, measures(logits, wanted)

    validate = None
    if held_out:
        documents = tokenizer.encode(held_out[0])
        answers = torch.tensor([index[label] for label in held_out[1]], device="cpu")

        def validate(between):
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


def fit_lm(job, record, model, tokenizer, docs, held_out, plan):
    """Stages 1 and 2 from the initial model on. docs: arrays of indices; held_out: texts or None."""
    config, finetune, device = record["config"], record["stage"] == "finetune", job.device
    shuffle = finetune and config.shuffle_texts
    epoch_stream(
        docs, config.batch_size, config.bptt, config.seed, 0, shuffle
    )  # raises here if the text is too short
    valid_docs = held_out and tokenizer.encode(held_out)
    if valid_docs and sum(map(len, valid_docs)) < 2:
        raise ValueError("valid is too short: 1 token, a perplexity needs at least 2")
    model.to(device)

    def loss_of(model, batch):
        ids, targets = (to_device(x, device) for x in batch)
        loss, entropy = model(ids, targets, alpha=config.alpha, beta=config.beta)
        return loss, {"loss": entropy}

    def validate(between):
        loss = stream_loss(model, valid_docs, config.batch_size, config.bptt, between)
        return {"loss": loss, "perplexity": float(np.exp(loss))}

    def set_hidden(hidden):
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


def prepare(config, out, resume, overwrite, device, progress, callback):
    """Validates every argument that can be checked before reading text, and returns the Job."""
    check_train_extras()
    check_show(progress)
    device = pick_device(device)
    if getattr(config, "cuda_graph", False) and device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, got device={str(device)!r}")
    team = Team(device)
    if getattr(config, "cuda_graph", False) and team.size > 1:
        raise ValueError(f"cuda_graph=True works in one process only, and {team.size} train here")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be None or a function that takes a metrics line, got {callback!r}")
    run = team.directory(out, resume, overwrite)
    return Job(team, run, progress if team.is_first else False, callback)


@contextlib.contextmanager
def own_randomness(seed, device):
    """Seeds torch's default generators inside the block, and restores the caller's state after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
