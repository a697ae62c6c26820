"""ulmfit-fast demo: the three stages on text that every installation has, and what each of them gains."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .batches import epoch_stream
from .config import make_config
from .demo_text import general_text, labelled_text, split
from .progress import Show
from .results import build_lm, load
from .runs import as_directory
from .stock import StockLanguageModel
from .text import Tokenizer
from .train import finetune_lm, pretrain_lm, train_classifier

WIDTH = 78
# Of stage 3, chosen on other splits of the texts than the one shown. What the first two stages have learned
# from them bears twice the preset's rate, at which fresh weights learn far less.
RATES = {"tiny": {"lr": 1e-2}}
NO_GAIN = "  (So little pre-training does not help here; see benchmarks/README.md.)"


def run_demo(
    out: str | Path = "runs/demo",
    preset: str = "tiny",
    seed: int = 0,
    progress: Show = None,
    overwrite: bool = True,
    say: Callable[[str], object] = print,
    **overrides: Any,
) -> dict[str, Any]:
    """Trains the three stages and a classifier from scratch in `out`, and returns the figures it prints.

    overrides: options of all stages, for example epochs=1.
    """
    out, start = as_directory(out, "out"), time.perf_counter()
    options: dict[str, Any] = dict(
        preset=preset, seed=seed, progress=progress, overwrite=overwrite, **overrides
    )
    try:
        say("Reading the documentation of the Python standard library and of torch ...")
        general, (train, held) = general_text(), split(*labelled_text(), seed=seed)
        classes = sorted(set(train[1]))
        say(f"Stage 1: a language model of {len(general):,} texts of the standard library")
        pretrain_lm(general, out / "1-general", **options)
        say(f"Stage 2: the same, tuned on {len(train[0]):,} texts of torch")
        lm = finetune_lm(out / "1-general", train[0], out / "2-target", valid=held[0], **options)
        say(f"Stage 3: a classifier of torch's sub-packages {', '.join(classes)}")
        tuned = RATES.get(preset, {}) | options
        clf = train_classifier(lm, *train, out / "3-classifier", valid=held, **tuned)
        say("For comparison: the same classifier from scratch, at the rate that suits fresh weights")
        scratch = train_classifier(lm, *train, out / "scratch", valid=held, from_scratch=True, **options)
        say("For comparison: our training step and that of stock torch modules")
        speed = compare_steps(general, load(out / "1-general").tokenizer, preset)
    except KeyboardInterrupt:  # a stage's own message is of --resume, which the demo does not have
        raise KeyboardInterrupt(
            f"the demo was stopped; it would start anew. {out} keeps the stages that are done"
        ) from None
    majority = Counter(train[1]).most_common(1)[0][0]
    figures = {
        "classes": classes,
        "held_out": len(held[0]),
        "perplexity_before": next(x["perplexity"] for x in lm.history if x["kind"] == "valid"),
        "perplexity_after": lm.metrics["valid_perplexity"],
        "accuracy_majority": held[1].count(majority) / len(held[1]),
        "accuracy_scratch": scratch.metrics["valid_accuracy"],
        "accuracy": clf.metrics["valid_accuracy"],
        "tokens_per_s": speed["ours"],
        "tokens_per_s_stock": speed["stock"],
        "seconds": time.perf_counter() - start,
    }
    say(table(figures, out))
    return figures


def compare_steps(
    texts: list[str],
    tokenizer: Tokenizer,
    preset: str = "tiny",
    steps: int = 12,
    warm_up: int = 2,
    seed: int = 0,
) -> dict[str, float]:
    """{"ours", "stock"}: tokens a second of stage 1's training step, medians over `steps` of each, taken in
    turn.

    Both start from the same weights, read the same windows with the same dropout probabilities, and end each
    step with clipping and fused AdamW. On the CPU in fp32.
    """
    config = make_config("pretrain", preset)
    docs = tokenizer.encode(texts[: max(50, len(texts) // 4)])
    stream = epoch_stream(docs, config.batch_size, config.bptt, seed, 0, shuffle=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        ours = build_lm(config.model_config(), len(tokenizer), config.dropouts()).train()
        stock = StockLanguageModel.like(ours, **config.dropouts()).train()
        models: dict[str, nn.Module] = {"ours": ours, "stock": stock}
        optimizers = {
            name: torch.optim.AdamW(m.parameters(), lr=config.lr, fused=True) for name, m in models.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for k in range(steps + warm_up):
            ids, targets = stream[k % max(1, len(stream) - 1)]
            for name, model in models.items():
                start = time.perf_counter()
                model(ids, targets)[0].backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimizers[name].step()
                optimizers[name].zero_grad()
                if k >= warm_up:
                    seconds[name].append(time.perf_counter() - start)
    tokens = ids.numel()
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def table(f: dict[str, Any], out: str | Path) -> str:
    """The figures as text of at most 80 columns."""
    line = "-" * WIDTH

    def row(name: str, value: str, note: str = "") -> str:
        return f"  {name:<38}{value:>12}  {note}".rstrip()

    minutes, seconds = divmod(round(f["seconds"]), 60)
    return "\n".join(
        [
            line,
            f"Perplexity on {f['held_out']} texts of torch that no stage trained on",
            row("after stage 1 (general text)", f"{f['perplexity_before']:.1f}"),
            row("after stage 2 (tuned on torch's text)", f"{f['perplexity_after']:.1f}"),
            line,
            f"Accuracy on the same texts: which of {len(f['classes'])} sub-packages of torch are they from?",
            row("guessing the most frequent", f"{f['accuracy_majority']:.1%}"),
            row("trained from scratch", f"{f['accuracy_scratch']:.1%}"),
            row("trained after stages 1 and 2", f"{f['accuracy']:.1%}"),
            *([] if f["accuracy"] > f["accuracy_scratch"] else [NO_GAIN]),
            line,
            f"Tokens a second of a training step of stage 1, fp32, {torch.get_num_threads()} threads",
            row("the same model on stock torch modules", f"{f['tokens_per_s_stock']:,.0f}"),
            row(
                "ulmfit_fast",
                f"{f['tokens_per_s']:,.0f}",
                f"{f['tokens_per_s'] / f['tokens_per_s_stock']:.2f} times",
            ),
            line,
            f"All of this took {minutes} min {seconds} s.",
            "Models, metrics and curves.png: 1-general, 2-target, 3-classifier, scratch, in",
            f"  {out}",
            "Classify a sentence:",
            f'  ulmfit-fast predict {out}/3-classifier "Applies a linear layer to the input"',
        ]
    )
