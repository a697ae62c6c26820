"""ULMFiT's three stages: pretrain_lm, finetune_lm, train_classifier; each leaves a run directory behind."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .checkpoints import load_state
from .config import ClassifierConfig, FinetuneConfig, PretrainConfig, make_config
from .corpus import Labels, Sources, check_known, label_classes, read_labelled, read_texts
from .fitting import Callback, Show, fit_classifier, fit_lm, own_randomness, prepare
from .initial import check_direction, start_from_frequencies, starting_point, way
from .model import layer_groups
from .pretrained import Checkpoint
from .progress import announce
from .results import TrainedClassifier, TrainedLM, build_classifier, build_lm, load
from .runs import fingerprint
from .schedules import Phase, head_first_plan
from .text import Tokenizer, own_vocab, target_vocab

# Fresh weights have nothing to thaw, nor lower layers to spare.
SCRATCH = dict(gradual_unfreezing=False, discriminative=1.0)

__all__ = ["finetune_lm", "load", "pretrain_lm", "train_classifier"]


def pretrain_lm(
    sources: Sources,
    out: str | Path,
    preset: str = "ulmfit",
    config: PretrainConfig | dict[str, Any] | None = None,
    valid: Sources | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Show = None,
    callback: Callback = None,
    **overrides: Any,
) -> TrainedLM:
    """Stage 1: trains a language model on general text and returns it as a TrainedLM.

    sources: a list of texts, of paths of text files (one text a line) and of CSV files (column `text`), or
    one path; a TSV file is read as a CSV. A str in a list is a path if it ends in .txt, .csv or .tsv and
    either exists or is a single word, else a text; give pathlib.Path for any other file.
    out: the run directory.         preset: "ulmfit", "small" or "tiny".
    config: a PretrainConfig, or a dict over the preset; `overrides` (lr=..., epochs=...) win over both. With
    backwards=True the model reads each text from its end to its beginning (see `text.Tokenizer`), and so do
    the later stages that start from it.
    valid: sources of a validation set, whose perplexity is measured after each epoch, in stage 2 also before
    the first.
    resume: go on with the interrupted run in `out`, with the numbers an uninterrupted run would have had; it
    needs the same sources and options (ValueError). A finished run of these is returned as it is, an empty
    directory starts from the beginning.
    overwrite: start anew although `out` holds a run, which is removed first.
    device: None is CUDA where it can be used, else the CPU.     progress: see progress.Progress.
    callback: called with each metrics line (a dict) of training: every `log_every` steps and at the end of an
    epoch. A KeyboardInterrupt that it raises stops the run with its state saved.
    Processes that torchrun started share the run: each calls the stage, with the same arguments, and gets the
    result; the first alone writes, shows progress and calls the callback. See team.py.

    The caller's random state is left as it was: everything follows from the option `seed`.
    """
    config = make_config("pretrain", preset, config, overrides)
    job = prepare(config, out, resume, overwrite, device, progress, callback)
    texts, held_out = _read_unlabelled(sources, "sources", valid)
    record = dict(stage="pretrain", preset=preset, model=config.model_config(), config=config, classes=None)
    record |= dict(backwards=config.backwards, data=fingerprint(texts, held_out))
    if job.run.holds_finished(record):
        return load(job.run.path, job.device)
    announce(f"counting and encoding the words of {len(texts):,} texts", job.progress)
    tokenizer = Tokenizer.train(texts, config.max_vocab, config.min_freq, config.backwards)
    docs = tokenizer.encode(texts)
    del texts  # training needs its indices alone, and a corpus is large
    with own_randomness(config.seed, job.device):
        model = build_lm(config.model_config(), len(tokenizer), config.dropouts())
        start_from_frequencies(model, docs)
        plan = [Phase(config.epochs, len(layer_groups(model)))]
        return fit_lm(job, record, model, tokenizer, docs, held_out, plan)


def finetune_lm(
    base_run: str | Path | TrainedLM | Checkpoint,
    texts: Sources,
    out: str | Path,
    preset: str | None = None,
    config: FinetuneConfig | dict[str, Any] | None = None,
    valid: Sources | None = None,
    *,
    backwards: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Show = None,
    callback: Callback = None,
    **overrides: Any,
) -> TrainedLM:
    """Stage 2: fine-tunes the language model of `base_run` on the target's texts; returns a TrainedLM.

    base_run: a run directory of stage 1 (or 2), the TrainedLM, or a published language model with its words:
    the path or URL of a checkpoint ("wt103-fwd.tgz"), or what load_checkpoint made of it. Words known to
    it keep their embedding, new ones begin with the mean; config.json says how many were known. The embedding
    and decoder train alone first, then all layers at discriminative rates.
    preset: None is the base run's, "ulmfit" for a checkpoint; the sizes are the model's own.
    backwards: the direction of a checkpoint that does not say it. None goes by its name: backwards where that
    has "bwd" in it ("wt103-bwd.tgz"). A run has a direction of its own (ValueError for another one).
    The other arguments are those of `pretrain_lm`, `texts` as its `sources`.
    """
    check_direction(backwards)
    base, sizes, base_preset = starting_point(base_run, "base_run", backwards)
    preset = preset or base_preset
    config = make_config("finetune", preset, config, overrides)
    job = prepare(config, out, resume, overwrite, device, progress, callback)
    texts, held_out = _read_unlabelled(texts, "texts", valid)
    words = own_vocab(base.tokens)
    record = dict(stage="finetune", preset=preset, model=sizes, config=config, classes=None)
    record |= dict(backwards=base.backwards, data=fingerprint(texts, held_out, words, base.state))
    if job.run.holds_finished(record):
        return load(job.run.path, job.device)
    announce(f"counting and encoding the words of {len(texts):,} texts", job.progress)
    itos = target_vocab(words, texts, config.max_vocab, config.min_freq, config.keep_base_vocab)
    tokenizer = Tokenizer.from_vocab(itos, base.backwards)
    docs = tokenizer.encode(texts)
    del texts
    with own_randomness(config.seed, job.device):
        model = build_lm(sizes, len(tokenizer), config.dropouts())
        moved = base.with_tokens(itos)
        load_state(model, moved.state, base.source)
        known = f"{moved.known:,} of {len(itos):,} words are known to {base.source}"
        announce(f"{known}, which reads {way(base.backwards)}", job.progress)
        plan = head_first_plan(config.head_epochs, config.epochs, len(layer_groups(model)))
        record["vocabulary"] = {"words": len(itos), "known": moved.known}
        return fit_lm(job, record, model, tokenizer, docs, held_out, plan)


def train_classifier(
    lm_run: str | Path | TrainedLM | Checkpoint | None,
    texts: str | Path | Iterable[str],
    labels: Labels | None = None,
    out: str | Path | None = None,
    preset: str | None = None,
    config: ClassifierConfig | dict[str, Any] | None = None,
    valid: str | Path | tuple[Iterable[str], Labels] | None = None,
    *,
    from_scratch: bool = False,
    backwards: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Show = None,
    callback: Callback = None,
    **overrides: Any,
) -> TrainedClassifier:
    """Stage 3: trains a classifier on the encoder of `lm_run` and returns it as a TrainedClassifier.

    lm_run: as base_run of `finetune_lm`, of stage 2 (or 1); an encoder's checkpoint will do. None trains
    from scratch, with a vocabulary of its own, and so does from_scratch=True with the vocabulary of `lm_run`:
    fresh weights, all layers from the first step at one rate.
    texts, labels: two lists (labels all str or all int; every str of texts is a text), or the path of a CSV
    or TSV with the columns text and label, whose labels are str. texts may also be the path of a text file,
    with labels as a list.
    valid: (texts, labels) or such a path; its accuracy is measured after each epoch.
    preset: None is that of lm_run, or "ulmfit" without one.
    backwards: as in `finetune_lm`; of a classifier from scratch its own direction, None being that of lm_run
    or, without one, forwards.
    The other arguments are those of `pretrain_lm`.
    """
    if out is None:
        raise TypeError("out is missing: name the run directory")
    check_direction(backwards)
    base, sizes, base_preset, weights = None, None, "ulmfit", {}
    if lm_run is not None:
        # fresh weights have no direction yet
        of_base = None if from_scratch else backwards
        base, sizes, base_preset = starting_point(lm_run, "lm_run", of_base, decoder=False)
        weights = {} if from_scratch else base.state
        base = base.with_tokens(own_vocab(base.tokens))
    preset = preset or base_preset
    backwards = bool(base and base.backwards) if backwards is None else backwards
    scratch = from_scratch or base is None
    if scratch and config is None:
        overrides = SCRATCH | overrides
    config = make_config("classify", preset, config, overrides)
    sizes = sizes or make_config("pretrain", preset).model_config()
    job = prepare(config, out, resume, overwrite, device, progress, callback)
    texts, labels = read_labelled(texts, labels)
    classes = label_classes(labels)
    held_out = _read_valid(valid, classes)
    words = base and base.tokens
    record = dict(stage="classify", preset=preset, model=sizes, config=config, classes=classes)
    record["backwards"] = backwards
    record["data"] = fingerprint(texts, labels, held_out, words, scratch, weights)
    if job.run.holds_finished(record):
        return load(job.run.path, job.device)
    if base:
        reader = "the classifier from scratch" if scratch else base.source
        announce(f"{reader} reads {way(backwards)}", job.progress)
        tokenizer = Tokenizer.from_vocab(words, backwards)
    else:
        tokenizer = Tokenizer.train(texts, config.max_vocab, config.min_freq, backwards)
    with own_randomness(config.seed, job.device):
        model = build_classifier(sizes, len(tokenizer), len(classes), config)
        if not scratch:
            load_state(model[0].module, base.encoder().state_dict(), base.source)
        return fit_classifier(job, record, model, tokenizer, texts, labels, held_out)


def _read_unlabelled(sources, argument, valid):
    return read_texts(sources, argument), None if valid is None else read_texts(valid, "valid")


def _read_valid(valid, classes):
    if valid is None:
        return None
    if isinstance(valid, tuple) and len(valid) != 2:
        raise TypeError(f"valid must be (texts, labels), or the path of a CSV, got a tuple of {len(valid)}")
    # a str there is a second text, and labels are missing
    if isinstance(valid, (tuple, list)) and len(valid) == 2 and not isinstance(valid[1], (str, os.PathLike)):
        texts, labels = read_labelled(*valid, argument="valid")
    else:
        texts, labels = read_labelled(valid, argument="valid")
    check_known(labels, classes, "valid")
    return texts, labels
