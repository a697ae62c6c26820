"""ULMFiT's three stages: pretrain_lm, finetune_lm, train_classifier; each leaves a run directory behind."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import load_state
from .config import ClassifierConfig, FinetuneConfig, ModelConfig, PretrainConfig, check_flag, make_config
from .corpus import Labels, Sources, label_classes, read_labelled, read_texts, read_valid
from .fitting import (
    Callback,
    check_cuda_graph,
    finished,
    fit_classifier,
    fit_lm,
    own_randomness,
    prepare,
)
from .initial import check_direction, start_from_frequencies, starting_point, way
from .model import layer_groups
from .pretrained import Checkpoint
from .progress import Show, announce
from .results import TrainedClassifier, TrainedLM, build_classifier, build_lm, load
from .runs import fingerprint
from .schedules import Phase, head_first_plan
from .text import Tokenizer, own_vocab, target_vocab, warn_of_unspaced

# Fresh weights need neither gradual unfreezing nor lower rates in lower layers.
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
    """Stage 1 (Howard and Ruder 2018, section 3.1): trains a language model on general text.

    Processes that torchrun started share the run: each calls the stage, with the same arguments, and gets the
    result. The first alone writes, shows progress and calls the callback (see team.py). The caller's random
    state is left as it was: everything follows from the option `seed`. Trainings in threads of one process
    take turns, as they share torch's default generators; nothing else may draw from these meanwhile.

    Args:
        sources: a list of texts, of paths of text files (one text a line) and of CSV or TSV files (column
            `text`), or one path. A str in a list is a path if it ends in .txt, .csv or .tsv and either exists
            or is a single word, else a text; give pathlib.Path for any other file.
        out: the run directory.
        preset: "ulmfit", "small" or "tiny".
        config: a PretrainConfig, or a dict over the preset.
        valid: sources of a validation set, whose perplexity is measured after each epoch.
        resume: go on with the interrupted run in `out`, with the numbers an uninterrupted run would have had.
            It needs the same sources and options. A finished run of these is returned as it is; an empty
            directory starts from the beginning.
        overwrite: start anew although `out` holds a run, which is removed first.
        device: where to train; None is CUDA where it can be used, else the CPU.
        progress: None draws a bar on a terminal, True anywhere; "lines" prints a line at the end of each
            epoch, False nothing.
        callback: called with each metrics line (a dict) of training: every `log_every` steps and at the end
            of an epoch. A KeyboardInterrupt that it raises stops the run with its state saved.
        **overrides: options of PretrainConfig (lr=..., epochs=...), which win over `preset` and `config`.
            With backwards=True the model reads each text from its end to its beginning (see
            `text.Tokenizer`), and so do the later stages that start from it.

    Returns:
        TrainedLM of the finished run.

    Raises:
        TypeError, ValueError: an argument is not what is said above, the text is too short, or `resume` finds
            a run of other sources or options.
        FileNotFoundError: a source does not exist.
        FileExistsError: `out` holds a run, without `resume` or `overwrite`, or another program's files.
        BlockingIOError: another process trains in `out`.
        FloatingPointError: the loss or a weight became infinite or NaN.
        KeyboardInterrupt: Ctrl-C, SIGTERM or the callback stopped the run; its state is saved.
        ImportError: a package of the extra [train] is missing.
    """
    job = prepare(out, resume, overwrite, device, progress, callback)
    config = make_config("pretrain", preset, config, overrides)
    check_cuda_graph(config, job.team)
    texts, held_out = _read_unlabelled(sources, "sources", valid)
    warn_of_unspaced(texts, "sources")
    record = dict(stage="pretrain", preset=preset, model=config.model_config(), config=config, classes=None)
    record |= dict(backwards=config.backwards, data=fingerprint(texts, held_out))
    if job.run.holds_finished(record):
        return finished(job, TrainedLM)
    announce(f"counting and encoding the words of {len(texts):,} texts", job.progress)
    tokenizer = Tokenizer.train(texts, config.max_vocab, config.min_freq, config.backwards)
    docs = tokenizer.encode(texts)
    del texts  # training needs its indices alone, and a corpus is large
    with own_randomness(config.seed, job):
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
    """Stage 2 (Howard and Ruder 2018, section 3.2): fine-tunes a language model on the target's texts.

    Words known to the model keep their embedding, new ones begin with the mean; config.json says how many
    were known. The embedding and decoder train alone first, then all layers at discriminative rates.

    Args:
        base_run: a run directory of stage 1 (or 2), the TrainedLM, or a published language model with its
            words: the path or URL of a checkpoint ("wt103-fwd.tgz"), or what load_checkpoint made of it.
        texts: as `sources` of `pretrain_lm`.
        out: the run directory.
        preset: None is that of `base_run`, "ulmfit" for a checkpoint; the sizes are the model's own.
        config: a FinetuneConfig, or a dict over the preset.
        valid: as in `pretrain_lm`; the perplexity is also measured before the first epoch.
        backwards: the direction of a checkpoint that does not say it. None goes by its name: backwards where
            that has "bwd" in it ("wt103-bwd.tgz"). A run says its direction, which this must not contradict.
        resume, overwrite, device, progress, callback: as in `pretrain_lm`.
        **overrides: options of FinetuneConfig, which win over `preset` and `config`.

    Returns:
        TrainedLM of the finished run.

    Raises:
        ValueError: `base_run` is a classifier's run, has not finished, or has another direction than
            `backwards`.
        As `pretrain_lm` in all else, and as `load_checkpoint` for a checkpoint.
    """
    backwards = check_direction(backwards)
    job = prepare(out, resume, overwrite, device, progress, callback)
    base, words, sizes, base_preset = starting_point(base_run, "base_run", backwards)
    preset = preset or base_preset
    config = make_config("finetune", preset, config, overrides)
    check_cuda_graph(config, job.team)
    lines, held_out = _read_unlabelled(texts, "texts", valid)
    warn_of_unspaced(lines, "texts")
    words = own_vocab(words)
    record = dict(stage="finetune", preset=preset, model=sizes, config=config, classes=None)
    record |= dict(backwards=base.backwards, data=fingerprint(lines, held_out, words, base.state))
    if job.run.holds_finished(record):
        return finished(job, TrainedLM)
    announce(f"counting and encoding the words of {len(lines):,} texts", job.progress)
    itos = target_vocab(words, lines, config.max_vocab, config.min_freq, config.keep_base_vocab)
    tokenizer = Tokenizer.from_vocab(itos, bool(base.backwards))
    docs = tokenizer.encode(lines)
    del lines
    with own_randomness(config.seed, job):
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
    """Stage 3 (Howard and Ruder 2018, section 3.3): trains a classifier on the encoder of `lm_run`.

    Args:
        lm_run: as `base_run` of `finetune_lm`, of stage 2 (or 1); an encoder's checkpoint will do. None
            trains from scratch, with a vocabulary of its own.
        texts: a list, of which every str is a text; or the path of a CSV or TSV with the columns text and
            label; or, with `labels` as a list, the path of a text file.
        labels: one for each text, all str or all int; None for the column label, whose labels are str.
        out: the run directory; it must be given.
        preset: None is that of `lm_run`, or "ulmfit" without one.
        config: a ClassifierConfig, or a dict over the preset.
        valid: (texts, labels), or the path of a CSV or TSV; its accuracy is measured after each epoch.
        from_scratch: fresh weights, with the vocabulary and sizes of `lm_run`. From scratch, here and with
            lm_run=None, all layers train from the first step at one rate, unless `config` or `overrides` say
            otherwise.
        backwards: as in `finetune_lm`; of a classifier from scratch its own direction, None being that of
            `lm_run` or, without one, forwards.
        resume, overwrite, device, progress, callback: as in `pretrain_lm`.
        **overrides: options of ClassifierConfig, which win over `preset` and `config`.

    Returns:
        TrainedClassifier of the finished run.

    Raises:
        TypeError: `out` is missing, or labels are neither all str nor all int.
        ValueError: there are fewer than two classes, a label of `valid` is none of them, or one is missing.
        As `finetune_lm` in all else.
    """
    if out is None:
        raise TypeError("out is missing: name the run directory")
    backwards = check_direction(backwards)
    from_scratch = check_flag("from_scratch", from_scratch)
    job = prepare(out, resume, overwrite, device, progress, callback)
    base: Checkpoint | None = None
    sizes: ModelConfig | None = None
    weights: dict[str, Tensor] = {}
    words: list[str] = []
    base_preset = "ulmfit"
    if lm_run is not None:
        # fresh weights have no direction yet
        of_base = None if from_scratch else backwards
        base, words, sizes, base_preset = starting_point(lm_run, "lm_run", of_base, decoder=False)
        weights = {} if from_scratch else base.state
        words = own_vocab(words)
        base = base.with_tokens(words)
    preset = preset or base_preset
    backwards = bool(base and base.backwards) if backwards is None else backwards
    scratch = from_scratch or base is None
    if scratch and isinstance(config, dict | None):
        config = SCRATCH | (config or {})
    config = make_config("classify", preset, config, overrides)
    sizes = sizes or make_config("pretrain", preset).model_config()
    documents, answers = read_labelled(texts, labels)
    warn_of_unspaced(documents, "texts")
    classes = label_classes(answers)
    held_out = None if valid is None else read_valid(valid, classes)
    record = dict(stage="classify", preset=preset, model=sizes, config=config, classes=classes)
    record["backwards"] = backwards
    record["data"] = fingerprint(documents, answers, held_out, words or None, scratch, weights)
    if job.run.holds_finished(record):
        return finished(job, TrainedClassifier)
    if base:
        reader = "the classifier from scratch" if scratch else base.source
        announce(f"{reader} reads {way(backwards)}", job.progress)
        tokenizer = Tokenizer.from_vocab(words, backwards)
    else:
        tokenizer = Tokenizer.train(documents, config.max_vocab, config.min_freq, backwards)
    with own_randomness(config.seed, job):
        model = build_classifier(sizes, len(tokenizer), len(classes), config)
        if base and not scratch:
            load_state(model[0].module, base.encoder().state_dict(), base.source)
        return fit_classifier(job, record, model, tokenizer, documents, answers, held_out)


def _read_unlabelled(
    sources: Sources, argument: str, valid: Sources | None
) -> tuple[list[str], list[str] | None]:
    return read_texts(sources, argument), None if valid is None else read_texts(valid, "valid")
