"""fastai's side of the quality table: the same token ids, sizes, epochs and batches, fastai's own recipe.

Runs in an environment of its own (torch, fastai 2.8, torchvision; it never imports ulmfit_fast) on the token
files that `python -m benchmarks.quality --export-tokens` writes, one stage a call:

    python benchmarks/quality_fastai.py pretrain --tokens DIR --corpus general --work RUNS --lr 5e-3
    python benchmarks/quality_fastai.py finetune --tokens DIR --corpus trec-6 --work RUNS --lr 2e-3
    python benchmarks/quality_fastai.py classify --tokens DIR --corpus trec-6 --work RUNS --lr 1e-2 --seed 0

`--max-docs` and `--max-steps` cut a stage short, to learn what an epoch costs before paying for it.

Recipes, from fastai's documentation: pre-training `fit_one_cycle`; the language model's fine-tuning one
frozen epoch at ten times the rate, then all layers (the text tutorial: 2e-2, then 2e-3); the classifier in
the tutorial's order: frozen, freeze_to(-2), freeze_to(-3), unfrozen, with slice(lr / 2.6**4, lr).
"""

import argparse
import json
import math
import os
import pickle
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch


def import_fastai():
    """Import fastai.text, whose import of torchvision needs nothing but that the import succeeds.

    A CUDA build of torchvision beside a CPU torch cannot load its operators and dies while describing two of
    them; declaring their schemas first lets the import through. Text models call none of torchvision.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_fastai.library = torch.library.Library(
            "torchvision", "FRAGMENT"
        )  # kept: deleting it undoes it
        for op in ("nms", "qnms"):
            import_fastai.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import fastai.text.all as ft

    return ft


def read_corpus(tokens: Path, name: str, max_docs: int | None = None):
    """ids of each document (list of int64 tensors) and labels (int64 array, or None) of `tokens/name.npz`."""
    with np.load(tokens / f"{name}.npz") as data:
        ids, offsets = data["ids"].astype(np.int64), data["offsets"]
        labels = data["labels"] if "labels" in data else None
    n = len(offsets) - 1 if max_docs is None else min(max_docs, len(offsets) - 1)
    docs = [torch.from_numpy(ids[offsets[i] : offsets[i + 1]]) for i in range(n)]
    return docs, None if labels is None else labels[:n]


def lm_loader(ft, docs, args, shuffle=False):
    items = [(ft.LMTensorText(d),) for d in docs]
    bs = max(1, min(args.batch_size, sum(map(len, docs)) // args.bptt))
    return ft.LMDataLoader(items, lens=[len(d) for d in docs], bs=bs, seq_len=args.bptt, shuffle=shuffle)


def classifier_loader(ft, docs, labels, args, train):
    items = [(ft.TensorText(d), ft.TensorCategory(int(y))) for d, y in zip(docs, labels, strict=True)]
    return ft.SortedDL(
        items,
        res=[len(d) for d in docs],
        bs=args.batch_size,
        shuffle=train,
        drop_last=train,
        before_batch=ft.Pad_Chunk(seq_len=args.bptt),
    )


def step_limit(ft, n):
    """A callback that ends a fit after n steps, or [] without a limit."""
    if not n:
        return []

    class Limit(ft.Callback):
        def after_batch(self):
            if self.training and self.train_iter >= n:
                raise ft.CancelFitException()

    return [Limit()]


def model_config(args, lm: bool):
    """Sizes are given; the dropouts are fastai's own (scaled by drop_mult in the learner)."""
    import fastai.text.models.awdlstm as awd

    base = awd.awd_lstm_lm_config if lm else awd.awd_lstm_clas_config
    return dict(base, emb_sz=args.emb_sz, n_hid=args.n_hid, n_layers=args.n_layers)


def lm_learner(ft, args, train_docs, vocab, shuffle):
    train = lm_loader(ft, train_docs, args, shuffle)
    tiny = lm_loader(ft, [torch.cat(list(train_docs))[: 2 * args.bptt * args.batch_size]], args)
    dls = ft.DataLoaders(train, tiny, device=torch.device("cpu"))
    dls.vocab = vocab
    learn = ft.language_model_learner(
        dls,
        ft.AWD_LSTM,
        config=model_config(args, True),
        drop_mult=args.drop_mult,
        pretrained=False,
        path=args.work,
        model_dir="fastai",
    )
    if args.quiet:
        learn.remove_cb(ft.ProgressCallback)
    return learn


def test_perplexity(learn, args, name, columns=16):
    """exp of the mean cross-entropy of corpus `name`, as ulmfit_fast's `perplexity` reads it.

    The stream in `columns` columns, each beginning with zero state, which is carried from window to window.
    """
    stream = torch.cat(read_corpus(args.tokens, name)[0])
    n = len(stream) - 1
    length = -(-n // columns)
    ids, targets = torch.ones(columns * length, dtype=torch.int64), torch.full((columns * length,), -100)
    ids[:n], targets[:n] = stream[:-1], stream[1:]
    ids, targets = ids.view(columns, length), targets.view(columns, length)
    learn.model.eval()
    learn.model.reset()
    start, total = time.perf_counter(), 0.0
    with torch.no_grad():
        for i in range(0, length, args.bptt):
            logits = learn.model(ids[:, i : i + args.bptt])[0]
            y = targets[:, i : i + args.bptt]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y.flatten(), reduction="sum"
            ).item()
    return {"perplexity": math.exp(total / n), "test_tokens": n, "seconds_test": time.perf_counter() - start}


def pretrain(ft, args, vocab):
    docs, _ = read_corpus(args.tokens, args.corpus, args.max_docs)
    learn = lm_learner(ft, args, docs, vocab, shuffle=False)
    cost = timed_fit(learn, args, [(learn.unfreeze, args.epochs, args.lr)], ft)
    learn.save(args.corpus, with_opt=False)
    (args.work / "fastai" / f"{args.corpus}.pkl").write_bytes(pickle.dumps(vocab))
    return {**cost, "train_tokens": sum(map(len, docs))}, learn


def finetune(ft, args, vocab):
    docs, _ = read_corpus(args.tokens, f"{args.corpus}-train", args.max_docs)
    learn = lm_learner(ft, args, docs, vocab, shuffle=len(docs) > 1)
    base = args.work / "fastai" / args.base
    learn.load_pretrained(f"{base}.pth", f"{base}.pkl")  # carries known words' rows over
    frozen = args.frozen_epochs
    plan = [(learn.freeze, frozen, 10 * args.lr), (learn.unfreeze, args.epochs - frozen, args.lr)]
    cost = timed_fit(learn, args, plan, ft)
    learn.save_encoder(f"{args.corpus}-encoder")
    return {**cost, "train_tokens": sum(map(len, docs))}, learn


def classify(ft, args, vocab):
    docs, labels = read_corpus(args.tokens, f"{args.corpus}-train", args.max_docs)
    test_docs, test_labels = read_corpus(args.tokens, f"{args.corpus}-test")
    train = classifier_loader(ft, docs, labels, args, train=True)
    test = classifier_loader(ft, test_docs, test_labels, args, train=False)
    tiny = classifier_loader(ft, docs[:4], labels[:4], args, train=False)  # ours does not validate either
    dls = ft.DataLoaders(train, tiny, device=torch.device("cpu"))
    dls.vocab = vocab
    learn = ft.text_classifier_learner(
        dls,
        ft.AWD_LSTM,
        seq_len=args.bptt,
        config=model_config(args, False),
        pretrained=False,
        drop_mult=args.drop_mult,
        n_out=int(max(labels)) + 1,
        loss_func=ft.CrossEntropyLossFlat(),
        metrics=ft.accuracy,
        path=args.work,
        model_dir="fastai",
    )
    if args.quiet:
        learn.remove_cb(ft.ProgressCallback)
    learn.load_encoder(f"{args.corpus}-encoder")
    lr, down = args.lr, 2.6**4
    plan = [
        (learn.freeze, 1, 2 * lr),
        (lambda: learn.freeze_to(-2), 1, slice(lr / down, lr)),
        (lambda: learn.freeze_to(-3), 1, slice(lr / 2 / down, lr / 2)),
        (learn.unfreeze, args.epochs - 3, slice(lr / 10 / down, lr / 10)),
    ]
    cost = timed_fit(learn, args, plan, ft)
    result = {**cost, "train_tokens": sum(map(len, docs))}
    start = time.perf_counter()
    preds, targets = learn.get_preds(dl=test)
    result |= {
        "accuracy": (preds.argmax(1) == targets).double().mean().item(),
        "test_documents": len(targets),
        "seconds_test": time.perf_counter() - start,
    }
    return result, learn


def timed_fit(learn, args, plan, ft):
    """Run (prepare, epochs, lr) one after the other; wall and CPU seconds and optimiser steps of it all."""
    steps, start, cpu = 0, time.perf_counter(), time.process_time()
    for prepare, epochs, lr in plan:
        if epochs < 1:
            continue
        prepare()
        learn.fit_one_cycle(epochs, lr, cbs=step_limit(ft, args.max_steps))
        steps += len(learn.recorder.losses)
        print(
            f"fastai {args.stage} {args.corpus}: {len(learn.recorder.losses)} steps, "
            f"loss {float(learn.recorder.losses[-1]):.3f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds_train": wall, "cpu_seconds_train": cpu, "steps": steps}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("stage", choices=["pretrain", "finetune", "classify"])
    p.add_argument("--tokens", type=Path, required=True, help="folder written by quality --export-tokens")
    p.add_argument("--corpus", required=True, help="general, trec-6, movie-reviews or wikitext-2")
    p.add_argument("--work", type=Path, required=True, help="folder for fastai's models")
    p.add_argument("--record", type=Path, help="write the record here as JSON")
    p.add_argument("--base", default="general", help="finetune: corpus whose pre-trained model to start from")
    p.add_argument("--perplexity-on", help="after an LM stage: token file to measure perplexity on")
    p.add_argument("--epochs", type=int, default=1, help="total, frozen ones included")
    p.add_argument("--frozen-epochs", type=int, default=1, help="finetune: of the epochs, how many frozen")
    p.add_argument("--lr", type=float, required=True)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--bptt", type=int, default=70)
    p.add_argument("--drop-mult", type=float, default=1.0)
    p.add_argument("--emb-sz", type=int, default=200)
    p.add_argument("--n-hid", type=int, default=576)
    p.add_argument("--n-layers", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--max-docs", type=int)
    p.add_argument("--max-steps", type=int, help="stop each fit after so many steps")
    p.add_argument("--verbose", dest="quiet", action="store_false", help="fastai's progress table")
    args = p.parse_args(argv)

    torch.set_num_threads(args.threads)
    ft = import_fastai()
    ft.set_seed(args.seed, reproducible=True)
    args.work.joinpath("fastai").mkdir(parents=True, exist_ok=True)
    vocab_of = args.corpus if args.stage != "pretrain" else "general"
    vocab = json.loads((args.tokens / f"{vocab_of}.vocab.json").read_text(encoding="utf-8"))
    result, learn = {"pretrain": pretrain, "finetune": finetune, "classify": classify}[args.stage](
        ft, args, vocab
    )
    if args.perplexity_on:
        result |= test_perplexity(learn, args, args.perplexity_on)
    import fastai

    record = {
        "stage": args.stage,
        "vocab_sz": len(vocab),
        "dtype": "float32",
        **result,
        "hyper_parameters": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in ("tokens", "work", "record", "quiet")
        },
        "versions": {
            "fastai": fastai.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": args.threads,
    }
    print(json.dumps({k: v for k, v in record.items() if not isinstance(v, dict)}), flush=True)
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
