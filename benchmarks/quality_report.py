"""The quality table in Markdown, from whatever records there are."""

import statistics

from .quality_data import CLASSIFICATION, FEW, FEW_LABELS, PROBE

ARMS = {
    "svm": "linear SVM, TF-IDF of word 1- and 2-grams",
    "scratch": "from scratch",
    "stage1": "stages 1 + 3",
    "full": "stages 1 + 2 + 3",
    "fastai": "fastai 2.8, stages 1 + 2 + 3",
}
_STAGE1_OF = {"stage1": "ours", "full": "ours", "fastai": "fastai"}  # whose stage 1 an arm stands on


def table(records):
    """Markdown, a row an arm: mean ± standard deviation over seeds (how many), seconds of a run."""
    lines = [
        "| arm | TREC-6 accuracy % | movie-reviews accuracy % | WikiText-2 test perplexity "
        "| seconds: stage 1 | stages 2 + 3, TREC-6 | stages 2 + 3, movie-reviews |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, title in ARMS.items():
        accuracies = [_mean_sd([100 * r["accuracy"] for r in _of(records, d, arm)]) for d in CLASSIFICATION]
        owner = _STAGE1_OF.get(arm)
        first = [r for r in records if r["dataset"] == "general" and r["arm"] == owner]
        wiki = first if arm == "stage1" else _of(records, "wikitext-2", arm)
        seconds = [
            _mean_sd([sum(_training(r)) for r in _of(records, d, arm)], digits=0) for d in CLASSIFICATION
        ]
        lines.append(
            "| "
            + " | ".join(
                [
                    title,
                    *accuracies,
                    _mean_sd([r["perplexity"] for r in wiki]),
                    f"{sum(_training(first[0])):.0f}" if first else "-",
                    *seconds,
                ]
            )
            + " |"
        )
    return "\n".join(lines + ["", *_few_labels(records), *_probe(records), *_notes(records)])


def _few_labels(records):
    """A sentence: what each arm makes of TREC-6 with few labels."""
    found = {
        title: _mean_sd([100 * r["accuracy"] for r in _of(records, FEW, arm)]) for arm, title in ARMS.items()
    }
    parts = [f"{title} {figure}" for title, figure in found.items() if figure != "-"]
    if not parts:
        return []
    return [f"TREC-6 with labels for {FEW_LABELS} of its 5,452 training questions: {'; '.join(parts)}."]


def _probe(records):
    """A sentence: what stages 1 and 2 make of the encoder itself."""
    found = [r for r in records if r["dataset"] == PROBE]
    if not found:
        return []
    titles = {"fresh": "fresh weights", "stage1": "stage 1", "stage2": "stages 1 + 2"}
    parts = [
        f"{title} {_mean_sd([100 * r['accuracy'][arm] for r in found])}, questions' perplexity "
        f"{_mean_sd([r['perplexity'][arm] for r in found])}"
        for arm, title in titles.items()
    ]
    return [f"Logistic regression on the frozen encoder's features of TREC-6: {'; '.join(parts)}."]


def _of(records, dataset, arm):
    return [r for r in records if r["dataset"] == dataset and r["arm"] == arm]


def _training(record):
    return [s for name, s in record["seconds"].items() if name != "test"]


def _mean_sd(values, digits=1):
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def _notes(records):
    """What a reader must know of the figures above, from the records themselves."""
    machines = sorted(
        {
            f"{r['device']}, {r['isa']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}, {r['dtype']}"
            for r in records
            if r["isa"] and r["dataset"] != PROBE
        }
    )
    cut = sorted({f"{r['dataset']}: {r['max_words']} words" for r in records if r.get("max_words")})
    notes = [f"Our arms were measured on {m}." for m in machines]
    if cut:
        notes.append(
            f"Longer documents ({'; '.join(cut)}) were cut to that many words, half from the beginning and "
            "half from the end, in every arm except the SVM, which reads them whole."
        )
    notes.append(
        "Perplexity is per token of ulmfit_fast's tokenizer (markers count as tokens), over stage 1's "
        "vocabulary; it does not compare with published figures. A dash means not measured."
    )
    return notes
