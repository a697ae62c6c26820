"""ULMFiT's three stages: pretrain_lm, finetune_lm, train_classifier; each leaves a run directory behind."""

import contextlib
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from .batches import DocumentBatches, epoch_stream
from .checkpoints import load_state
from .config import make_config
from .corpus import check_known, label_classes, read_labelled, read_texts
from .devices import pick_device, to_device
from .extras import check_train_extras
from .initial import start_from_frequencies, starting_point
from .loop import Loop
from .model import layer_groups
from .progress import announce, check_show
from .results import (
    TrainedClassifier,
    TrainedLM,
    build_classifier,
    build_lm,
    document_logits,
    load,
    stream_loss,
)
from .runs import RunDirectory
from .schedules import Phase, gradual_unfreezing_plan, head_first_plan
from .text import Tokenizer, own_vocab, target_vocab

# Fresh weights have nothing to thaw, nor lower layers to spare.
SCRATCH = dict(gradual_unfreezing=False, discriminative=1.0)

__all__ = ["finetune_lm", "load", "pretrain_lm", "train_classifier"]


def pretrain_lm(
    sources,
    out,
    preset="ulmfit",
    config=None,
    valid=None,
    *,
    resume=False,
    overwrite=False,
    device=None,
    progress=None,
    callback=None,
    **overrides,
):
    """Stage 1: trains a language model on general text and returns it as a TrainedLM.

    sources: a list of texts, of paths of text files (one text a line) and of CSV files (column `text`), or
    one path.
    out: the run directory.         preset: "ulmfit", "small" or "tiny".
    config: a PretrainConfig, or a dict over the preset; `overrides` (lr=..., epochs=...) win over both.
    valid: sources of a validation set, whose perplexity is measured after each epoch.
    resume: go on with the interrupted run in `out`, with the numbers an uninterrupted run would have had; it
    needs the same sources and options. A finished run is returned as it is, an empty directory starts from
    the beginning.
    overwrite: start anew although `out` holds a run.
    device: None is CUDA where it can be used, else the CPU.     progress: see progress.Progress.
    callback: called with each metrics line; a KeyboardInterrupt it raises stops the run with its state saved.

    The caller's random state is left as it was: everything follows from the option `seed`.
    """
    config = make_config("pretrain", preset, config, overrides)
    run, device = _prepare(out, resume, overwrite, device, progress, config.cuda_graph)
    texts = read_texts(sources, "sources")
    valid_texts = None if valid is None else read_texts(valid, "valid")
    if run.finished:
        return load(run.path, device)
    tokenizer = Tokenizer.train(texts, config.max_vocab, config.min_freq)
    docs = tokenizer.encode(texts)
    with _own_randomness(config.seed, device):
        model = build_lm(config.model_config(), len(tokenizer), config.dropouts())
        start_from_frequencies(model, docs)
        plan = [Phase(config.epochs, len(layer_groups(model)))]
        record = dict(
            stage="pretrain", preset=preset, model=config.model_config(), config=config, classes=None
        )
        return _train_lm(
            model, tokenizer, docs, valid_texts, plan, record, run, device, resume, progress, callback
        )


def finetune_lm(
    base_run,
    texts,
    out,
    preset=None,
    config=None,
    valid=None,
    *,
    resume=False,
    overwrite=False,
    device=None,
    progress=None,
    callback=None,
    **overrides,
):
    """Stage 2: tunes the language model of `base_run` on the target's texts and returns it as a TrainedLM.

    base_run: a run directory of stage 1 (or 2), the TrainedLM, or a published language model with its words:
    the path or address of a checkpoint ("wt103-fwd.tgz"), or what load_checkpoint made of it. Words known to
    it keep their embedding, new ones begin with the mean; config.json says how many were known. The embedding
    and decoder train alone first, then all layers at discriminative rates.
    preset: None is the base run's, "ulmfit" for a checkpoint; the sizes are the model's own. The other
    arguments are those of `pretrain_lm`, `texts` as its `sources`.
    """
    base, sizes, base_preset = starting_point(base_run, "base_run")
    preset = preset or base_preset
    config = make_config("finetune", preset, config, overrides)
    run, device = _prepare(out, resume, overwrite, device, progress, config.cuda_graph)
    texts = read_texts(texts, "texts")
    valid_texts = None if valid is None else read_texts(valid, "valid")
    if run.finished:
        return load(run.path, device)
    words = own_vocab(base.tokens)
    itos = target_vocab(words, texts, config.max_vocab, config.min_freq, config.keep_base_vocab)
    tokenizer = Tokenizer.from_vocab(itos)
    docs = tokenizer.encode(texts)
    with _own_randomness(config.seed, device):
        model = build_lm(sizes, len(tokenizer), config.dropouts())
        moved = base.with_tokens(itos)
        load_state(model, moved.state, base.source)
        announce(f"{moved.known:,} of {len(itos):,} words are known to {base.source}", progress)
        plan = head_first_plan(config.head_epochs, config.epochs, len(layer_groups(model)))
        record = dict(stage="finetune", preset=preset, model=sizes, config=config, classes=None)
        record["vocabulary"] = {"words": len(itos), "known": moved.known}
        return _train_lm(
            model, tokenizer, docs, valid_texts, plan, record, run, device, resume, progress, callback
        )


def train_classifier(
    lm_run,
    texts,
    labels=None,
    out=None,
    preset=None,
    config=None,
    valid=None,
    *,
    from_scratch=False,
    resume=False,
    overwrite=False,
    device=None,
    progress=None,
    callback=None,
    **overrides,
):
    """Stage 3: trains a classifier on the encoder of `lm_run` and returns it as a TrainedClassifier.

    lm_run: as base_run of `finetune_lm`, of stage 2 (or 1); an encoder's checkpoint will do. None trains
    from scratch, with a vocabulary of its own, and so does from_scratch=True with the vocabulary of `lm_run`:
    fresh weights, all layers from the first step at one rate.
    texts, labels: two lists (labels all str or all int), or the path of a CSV with the columns text and
    label.
    valid: (texts, labels) or such a path; its accuracy is measured after each epoch.
    preset: None is that of lm_run, or "ulmfit" without one. The other arguments are those of `pretrain_lm`.
    """
    if out is None:
        raise TypeError("out is missing: name the run directory")
    base, sizes, base_preset = None, None, "ulmfit"
    if lm_run is not None:
        base, sizes, base_preset = starting_point(lm_run, "lm_run", decoder=False)
        base = base.with_tokens(own_vocab(base.tokens))
    preset = preset or base_preset
    scratch = from_scratch or base is None
    if scratch and config is None:
        overrides = SCRATCH | overrides
    config = make_config("classify", preset, config, overrides)
    sizes = sizes or make_config("pretrain", preset).model_config()
    run, device = _prepare(out, resume, overwrite, device, progress)
    texts, labels = read_labelled(texts, labels)
    classes = label_classes(labels)
    held_out = _read_valid(valid, classes)
    if run.finished:
        return load(run.path, device)
    if base:
        tokenizer = Tokenizer.from_vocab(base.tokens)
    else:
        tokenizer = Tokenizer.train(texts, config.max_vocab, config.min_freq)
    with _own_randomness(config.seed, device):
        model = build_classifier(sizes, len(tokenizer), len(classes), config)
        if not scratch:
            load_state(model[0].module, base.encoder().state_dict(), base.source)
        record = dict(stage="classify", preset=preset, model=sizes, config=config, classes=classes)
        data = (texts, labels, held_out)
        return _train_classifier(model, tokenizer, data, record, run, device, resume, progress, callback)


def _train_classifier(model, tokenizer, data, record, run, device, resume, progress, callback):
    """Stage 3 from the initial model on. data: texts, labels, (texts, labels) held out or None."""
    texts, labels, held_out = data
    config, classes = record["config"], record["classes"]
    model.to(device)
    groups, docs = layer_groups(model), tokenizer.encode(texts)
    index = {c: i for i, c in enumerate(classes)}
    targets = [index[label] for label in labels]

    def measures(logits, wanted):
        return {
            "loss": F.cross_entropy(logits, wanted),
            "accuracy": (logits.argmax(1) == wanted).double().mean(),
        }

    def loss_of(batch):
        ids, lengths, wanted = batch
        wanted = to_device(wanted, device)
        logits = model(to_device(ids, device), lengths).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=config.label_smoothing)
        return loss, measures(logits, wanted), int(batch[1].sum())

    validate = None
    if held_out:
        documents = tokenizer.encode(held_out[0])
        answers = torch.tensor([index[label] for label in held_out[1]])

        def validate():
            logits = document_logits(model, documents, len(classes), 2 * config.batch_size)
            return {name: float(value) for name, value in measures(logits, answers).items()}

    run.fingerprint = _fingerprint(docs, labels)
    state = run.begin(record, tokenizer, resume)
    Loop(
        model,
        groups,
        gradual_unfreezing_plan(config.epochs, len(groups), config.gradual_unfreezing),
        config,
        run,
        batches=lambda epoch: DocumentBatches(docs, targets, config.batch_size, config.seed, epoch),
        loss_of=loss_of,
        validate=validate,
        title="classifier",
        progress=progress,
        callback=callback,
    ).train(state)
    return TrainedClassifier(model, tokenizer, config, classes, run.path, run.history())


def _train_lm(model, tokenizer, docs, valid_texts, plan, record, run, device, resume, progress, callback):
    """Stages 1 and 2 from the initial model on. docs: the training texts as arrays of indices."""
    config, finetune = record["config"], record["stage"] == "finetune"
    shuffle = finetune and config.shuffle_texts
    epoch_stream(
        docs, config.batch_size, config.bptt, config.seed, 0, shuffle
    )  # raises here when there is too little
    valid_docs = valid_texts and tokenizer.encode(valid_texts)
    model.to(device)

    def loss_of(batch):
        ids, targets = (to_device(x, device) for x in batch)
        loss, entropy = model(ids, targets, alpha=config.alpha, beta=config.beta)
        return loss, {"loss": entropy}, ids.numel()

    def validate():
        loss = stream_loss(model, valid_docs, config.batch_size, config.bptt)
        return {"loss": loss, "perplexity": float(np.exp(loss))}

    def set_hidden(hidden):
        model[0].hidden = hidden
        model[0].bs = hidden[0][0].shape[1]

    run.fingerprint = _fingerprint(docs, tokenizer.itos)
    state = run.begin(record, tokenizer, resume)
    Loop(
        model,
        layer_groups(model),
        plan,
        config,
        run,
        batches=lambda epoch: epoch_stream(docs, config.batch_size, config.bptt, config.seed, epoch, shuffle),
        loss_of=loss_of,
        validate=validate if valid_docs else None,
        validate_first=finetune and bool(valid_docs),
        before_epoch=model.reset,
        get_hidden=lambda: model[0].hidden,
        set_hidden=set_hidden,
        title="fine-tuning" if finetune else "pre-training",
        progress=progress,
        callback=callback,
    ).train(state)
    model.reset()
    return TrainedLM(model, tokenizer, config, run.path, run.history())


def _prepare(out, resume, overwrite, device, progress, cuda_graph=False):
    """(RunDirectory, torch.device), with all that can be refused before a text is read."""
    check_train_extras()
    check_show(progress)
    device = pick_device(device)
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, got device={str(device)!r}")
    return RunDirectory(out, resume, overwrite), device


def _read_valid(valid, classes):
    if valid is None:
        return None
    if isinstance(valid, (tuple, list)) and len(valid) == 2 and not isinstance(valid[0], str):
        texts, labels = read_labelled(*valid, argument="valid")
    else:
        texts, labels = read_labelled(valid, argument="valid")
    check_known(labels, classes, "valid")
    return texts, labels


@contextlib.contextmanager
def _own_randomness(seed, device):
    """torch's default generators begin with `seed` inside, and are the caller's again after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _fingerprint(docs, words):
    """A hash of what a run trains on, so that resume notices other texts."""
    digest = hashlib.sha256(repr(words).encode())
    for doc in docs:
        digest.update(len(doc).to_bytes(8, "little") + doc.tobytes())
    return digest.hexdigest()
