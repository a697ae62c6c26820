"""The arms of the quality table. Each returns a record: what was measured, in what time, with what settings.

All runs of one arm share a stage 1, trained once into work/stage1 (ours) or work/fastai (fastai).
"""

import json
import os
import subprocess
import time
from pathlib import Path

from . import quality_svm
from .quality_data import FEW, GENERAL, WIKITEXT_TEST, WIKITEXT_TRAIN, cut_words, read_split, wikitext_words
from .quality_recipes import FASTAI, OURS

PRESET = "small"


class Timer:
    """seconds[name] and cpu_seconds[name] (of all threads) of each `with timer(name)`.

    On a machine that others use too, CPU seconds tell more than the clock.
    """

    def __init__(self):
        self.seconds, self.cpu_seconds = {}, {}

    def __call__(self, name):
        self._name = name
        return self

    def __enter__(self):
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_):
        self.seconds[self._name] = round(time.perf_counter() - self._start[0], 2)
        self.cpu_seconds[self._name] = round(time.process_time() - self._start[1], 2)

    def record(self):
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def stage1(ctx):
    """Our general language model, and its perplexity on WikiText-2's test part."""
    import ulmfit_fast as uf

    options = dict(OURS["stage1"], precision=ctx.precision, seed=0)
    timer = Timer()
    with timer("stage1"):
        lm = uf.pretrain_lm(
            [str(ctx.data / name) for name in GENERAL],
            out=ctx.work / "stage1",
            preset=PRESET,
            resume=True,
            **options,
        )
    with timer("test"):
        perplexity = _perplexity(ctx, lm)
    return {
        **perplexity,
        "vocab_sz": len(lm.tokenizer),
        **timer.record(),
        "hyper_parameters": {"stage1": lm.config.to_dict()},
    }


def ours(ctx, dataset, arm, seed):
    """`scratch`, `stage1` (stage 3 on the general model) or `full` (all): accuracy on `dataset`."""
    import ulmfit_fast as uf

    (texts, labels), (test_texts, test_labels) = _splits(ctx, dataset)
    timer, settings = Timer(), {}
    base = None if arm == "scratch" else ctx.work / "stage1"
    if arm == "full":
        source = "trec-6" if dataset == FEW else dataset  # whose text stage 2 reads, all of it
        options = dict(OURS[source]["finetune"], precision=ctx.precision, seed=seed)
        base = ctx.work / f"{source}-lm-seed{seed}"
        unlabelled = cut_words(read_split(ctx.data, source, "train")[0], ctx.max_words.get(source))
        # FEW takes the model that TREC-6's own arm left, where there is one
        kept = dict(resume=True) if dataset == FEW else dict(overwrite=True)
        with timer("stage2"):
            lm = uf.finetune_lm(ctx.work / "stage1", unlabelled, out=base, preset=PRESET, **kept, **options)
        settings["stage2"] = lm.config.to_dict()
    options = dict(OURS[dataset]["classify"], precision=ctx.precision, seed=seed)
    with timer("stage3"):
        classifier = uf.train_classifier(
            base,
            texts,
            labels,
            out=ctx.work / f"{dataset}-{arm}-seed{seed}",
            preset=PRESET,
            overwrite=True,
            **options,
        )
    settings["stage3"] = classifier.config.to_dict()
    with timer("test"):
        accuracy = classifier.accuracy(test_texts, test_labels)
    return {
        "accuracy": accuracy,
        "test_documents": len(test_labels),
        "vocab_sz": len(classifier.tokenizer),
        **timer.record(),
        "hyper_parameters": settings,
    }


def ours_wikitext(ctx, arm, seed):
    """WikiText-2 test perplexity after training on its validation part (its training part is not available).

    `scratch` has stage 1's vocabulary, fresh weights, and all layers at one rate; `full` fine-tunes
    the general model. (`stage1` is in stage 1's own record.)
    """
    import ulmfit_fast as uf
    from ulmfit_fast.corpus import read_texts

    texts = read_texts([ctx.data / WIKITEXT_TRAIN])
    options = dict(OURS["wikitext-2"]["finetune"], precision=ctx.precision, seed=seed)
    base, timer = ctx.work / "stage1", Timer()
    if arm == "scratch":
        base = _fresh_copy(base, ctx.work / "stage1-fresh", seed)
        options.update(OURS["wikitext-2"]["scratch"])
    with timer("stage2"):
        lm = uf.finetune_lm(
            base,
            texts,
            out=ctx.work / f"wikitext-2-{arm}-seed{seed}",
            preset=PRESET,
            overwrite=True,
            **options,
        )
    with timer("test"):
        perplexity = _perplexity(ctx, lm)
    return {
        **perplexity,
        "vocab_sz": len(lm.tokenizer),
        **timer.record(),
        "hyper_parameters": {"stage2": lm.config.to_dict()},
    }


def _fresh_copy(run, out, seed):
    """The run `run` with weights drawn anew: one vocabulary, so that perplexities compare."""
    import shutil

    import torch

    import ulmfit_fast as uf
    from ulmfit_fast.checkpoints import save_model
    from ulmfit_fast.results import build_lm

    shutil.copytree(run, out, dirs_exist_ok=True)
    lm = uf.load(run)
    torch.manual_seed(seed)
    fresh = build_lm(lm.config.model_config(), len(lm.tokenizer), lm.config.dropouts())
    save_model(out / "model.safetensors", fresh)
    return out


def _perplexity(ctx, lm):
    from ulmfit_fast.corpus import read_texts

    texts = read_texts([ctx.data / WIKITEXT_TEST])
    tokens = sum(len(ids) for ids in lm.tokenizer.encode(texts)) - 1
    return with_per_word(ctx, {"perplexity": lm.perplexity(texts), "test_tokens": tokens})


def with_per_word(ctx, record):
    """Adds the perplexity per word of WikiText-2's own count, whatever the number of markers."""
    words = wikitext_words(ctx.data)
    return {**record, "perplexity_per_word": record["perplexity"] ** (record["test_tokens"] / words)}


def _splits(ctx, dataset):
    limit = ctx.max_words.get(dataset)
    for split in ("train", "test"):
        texts, labels = read_split(ctx.data, dataset, split)
        yield cut_words(texts, limit), labels


def svm(ctx, dataset):
    return quality_svm.run(ctx.data, dataset)


def fastai_stage(ctx, stage, corpus, recipe, seed=0, perplexity_on=None):
    """The record of one stage of quality_fastai.py, run in fastai's environment. recipe: our same stage's."""
    if not ctx.fastai_python:
        raise SystemExit(
            "quality: the fastai arm needs --fastai-python, a Python with fastai 2.8 "
            "(benchmarks/README.md says how to make one)."
        )
    script = Path(__file__).with_name("quality_fastai.py")
    out = ctx.work / f"fastai-{stage}-{corpus}-seed{seed}.json"
    head = recipe.get("head_epochs", 0)
    options = dict(FASTAI[stage], corpus=corpus, seed=seed, threads=ctx.threads, record=out, work=ctx.work)
    options.update(tokens=ctx.work / "tokens", batch_size=recipe["batch_size"], bptt=recipe["bptt"])
    options.update(epochs=recipe["epochs"] + head, frozen_epochs=head)
    if perplexity_on:
        options["perplexity_on"] = perplexity_on
    flags = [word for k, v in options.items() for word in ("--" + k.replace("_", "-"), str(v))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(ctx.threads)}
    subprocess.run([ctx.fastai_python, str(script), stage, *flags], check=True, env=environment)
    return json.loads(out.read_text(encoding="utf-8"))


def fastai_stage1(ctx):
    got = fastai_stage(ctx, "pretrain", "general", OURS["stage1"], perplexity_on="wikitext-2-test")
    return with_per_word(ctx, _fastai_record({"stage1": got}, got))


def fastai(ctx, dataset, seed):
    """fastai's three stages (or on WikiText-2 two) on the tokens that ours see."""
    wiki = "wikitext-2-test" if dataset == "wikitext-2" else None
    pieces = {"stage2": fastai_stage(ctx, "finetune", dataset, OURS[dataset]["finetune"], seed, wiki)}
    if wiki:
        return with_per_word(ctx, _fastai_record(pieces, pieces["stage2"]))
    pieces["stage3"] = fastai_stage(ctx, "classify", dataset, OURS[dataset]["classify"], seed)
    return _fastai_record(pieces, pieces["stage3"])


def _fastai_record(pieces, last):
    figures = ("accuracy", "test_documents", "perplexity", "test_tokens", "vocab_sz")
    seconds = {name: round(piece["seconds_train"], 2) for name, piece in pieces.items()}
    cpu_seconds = {name: round(piece["cpu_seconds_train"], 2) for name, piece in pieces.items()}
    return {
        **{k: last[k] for k in figures if k in last},
        "seconds": {**seconds, "test": round(last["seconds_test"], 2)},
        "cpu_seconds": cpu_seconds,
        "hyper_parameters": {name: piece["hyper_parameters"] for name, piece in pieces.items()},
        "fastai_versions": last["versions"],
    }
