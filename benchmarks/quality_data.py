"""Text and token files of the quality table: where they lie, how they are read, what fastai is fed."""

import csv
import json
import os
from pathlib import Path

import numpy as np

GENERAL = ("general/brown.txt", "general/state-of-the-union.txt", "wikitext-2/valid.txt")  # stage 1
WIKITEXT_TRAIN, WIKITEXT_TEST = "wikitext-2/valid.txt", "wikitext-2/test.txt"
CLASSIFICATION = ("trec-6", "movie-reviews")
DATASETS = (*CLASSIFICATION, "wikitext-2")
FEW = "trec-6-few"  # TREC-6 with labels for FEW_LABELS of its training questions, the same for every arm
FEW_LABELS = 300
PROBE = "trec-6-probe"  # records of quality_probe.py


def data_folder(given=None):
    """The folder with general/, wikitext-2/, trec-6/, movie-reviews/: `given`, else ../shared/data."""
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    missing = [name for name in ("general", *DATASETS) if not (folder / name).is_dir()]
    if missing:
        where = f"--data {given}" if given else "no --data given and ../shared/data"
        raise SystemExit(
            f"quality: {where} lacks {', '.join(missing)}: pass --data with a folder laid out as "
            "benchmarks/README.md says."
        )
    return folder


def read_split(data, dataset, split):
    """(texts, labels) of `split` ("train" or "test")."""
    if dataset == FEW:
        texts, labels = read_split(data, "trec-6", split)
        chosen = np.random.default_rng(0).permutation(len(texts))[:FEW_LABELS]
        return (
            (texts, labels) if split == "test" else ([texts[i] for i in chosen], [labels[i] for i in chosen])
        )
    csv.field_size_limit(2**31 - 1)
    with open(data / dataset / f"{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def cut_words(texts, max_words):
    """The first and the last max_words / 2 words of each longer text: what a small budget reads of it."""
    if not max_words:
        return texts
    half = max_words // 2
    split = [text.split() for text in texts]
    return [
        t if len(w) <= max_words else " ".join(w[:half] + w[-half:])
        for t, w in zip(texts, split, strict=True)
    ]


def wikitext_words(data):
    """Words and line ends of WikiText-2's test part, as its authors count them."""
    text = (data / WIKITEXT_TEST).read_text(encoding="utf-8")
    return len(text.split()) + text.count("\n")


def export_tokens(data, out, recipes, max_words=None):
    """Write the tokens and vocabularies that our three stages see, for fastai to train on the very same.

    out/NAME.vocab.json (list of words) for each corpus; out/NAME.npz with ids (int32, documents
    end to end), offsets (int64) and, where there are, labels (int64, of the sorted classes).
    recipes: `quality_recipes.OURS`, for the sizes of the vocabularies.
    """
    from ulmfit_fast.corpus import read_texts
    from ulmfit_fast.text import Tokenizer, target_vocab

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    general = read_texts([data / name for name in GENERAL])
    base = Tokenizer.train(general, recipes["stage1"]["max_vocab"], recipes["stage1"]["min_freq"])
    _write(out, "general", base, general)
    for dataset in DATASETS:
        options = recipes[dataset]["finetune"]
        if dataset == "wikitext-2":
            parts = {
                "train": (read_texts([data / WIKITEXT_TRAIN]), None),
                "test": (read_texts([data / WIKITEXT_TEST]), None),
            }
        else:
            parts = {split: read_split(data, dataset, split) for split in ("train", "test")}
            parts = {
                split: (cut_words(texts, max_words and max_words.get(dataset)), labels)
                for split, (texts, labels) in parts.items()
            }
        words = target_vocab(base.itos, parts["train"][0], options["max_vocab"], options["min_freq"])
        tokenizer = Tokenizer.from_vocab(words)
        classes = sorted(set(parts["train"][1] or ()))
        for split, (texts, labels) in parts.items():
            _write(out, f"{dataset}-{split}", tokenizer, texts, labels and [classes.index(y) for y in labels])
        os.replace(out / f"{dataset}-train.vocab.json", out / f"{dataset}.vocab.json")
        (out / f"{dataset}-test.vocab.json").unlink()


def _write(out, name, tokenizer, texts, labels=None):
    docs = tokenizer.encode(texts)
    arrays = {
        "ids": np.concatenate(docs).astype(np.int32),
        "offsets": np.cumsum([0] + [len(d) for d in docs]),
    }
    if labels is not None:
        arrays["labels"] = np.array(labels, np.int64)
    np.savez(out / f"{name}.npz", **arrays)
    (out / f"{name}.vocab.json").write_text(json.dumps(tokenizer.itos), encoding="utf-8")
    print(f"{name}: {len(docs)} texts, {len(arrays['ids'])} tokens, {len(tokenizer)} words in the vocabulary")
