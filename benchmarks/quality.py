"""Does each stage help? Accuracy, perplexity and seconds of every arm: one record for each, and the table.

    python -m benchmarks.quality --dataset trec-6 --arm scratch stage1 full --seeds 0 1 2
    python -m benchmarks.quality --report

Datasets: trec-6, movie-reviews (test accuracy) and wikitext-2 (test perplexity); trec-6-few is trec-6 with
labels for 300 questions, of all of which stage 2 still reads the text (not for fastai). Arms: `scratch`,
`stage1` (stage 3 on the general model), `full` (all three stages), `fastai` (its three stages on the same
tokens), `svm`. Stage 1 is trained once, in --work, when the first arm needs it. A piece whose record exists
is skipped (--again repeats it), so an interrupted table is completed by the same command.
"""

import argparse
import os
from pathlib import Path

from . import quality_arms as arms
from .quality_data import CLASSIFICATION, DATASETS, FEW, data_folder, export_tokens
from .quality_recipes import OURS
from .quality_report import ARMS, table
from .record import RESULTS, load_all, provenance, record_path, save


def parse(argv=None):
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--dataset", nargs="+", choices=[*DATASETS, FEW], default=list(DATASETS))
    p.add_argument(
        "--arm",
        nargs="+",
        choices=[*ARMS, "pretrain", "pretrain-fastai"],
        default=[],
        help="pretrain and pretrain-fastai: stage 1 alone",
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument(
        "--data", help="folder with general/, wikitext-2/, trec-6/, movie-reviews/ (default: ../shared/data)"
    )
    p.add_argument(
        "--work", type=Path, default=Path("runs/quality"), help="models and token files, not to be committed"
    )
    p.add_argument("--results", type=Path, default=RESULTS, help="where the records go")
    p.add_argument("--fastai-python", help="Python of an environment with fastai 2.8")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of our arms (fastai: fp32)")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument(
        "--max-words", type=int, help="movie-reviews: cut documents to so many words, in every arm but svm"
    )
    p.add_argument(
        "--export-tokens", action="store_true", help="write the tokens for fastai into WORK/tokens, and stop"
    )
    p.add_argument("--again", action="store_true", help="measure again what has a record")
    p.add_argument("--report", action="store_true", help="print the table of the records")
    args = p.parse_args(argv)
    if FEW in args.dataset and "fastai" in args.arm:
        p.error(f"--dataset {FEW} has no fastai arm")
    if not (args.arm or args.report or args.export_tokens):
        p.error("nothing to do: give --arm, --export-tokens or --report")
    args.max_words = {"movie-reviews": args.max_words} if args.max_words else {}
    return args


def measure(ctx, dataset, arm, run, seed=None):
    """Run one piece and save its record, unless there is one."""
    path = record_path(ctx.results, dataset, arm, seed)
    if path.exists() and not ctx.again:
        print(f"{path.name} exists: skipped")
        return
    where = provenance(ctx.threads)  # taken before the run: the load that others put on the machine
    record = run()
    kernels = {"fp32": "float32", "bf16": "bfloat16 autocast"}[ctx.precision]
    dtype = {"svm": "float64", "fastai": "float32"}.get(arm, kernels)
    if arm in ("svm", "fastai"):
        where["isa"] = None  # none of our kernels ran
    cut = None if arm == "svm" else ctx.max_words.get(dataset)
    head = {"dataset": dataset, "arm": arm, "seed": seed, "dtype": dtype, "max_words": cut}
    save(path, {**head, **record, **where})


def run_arm(ctx, dataset, arm):
    classification = (*CLASSIFICATION, FEW)
    if arm == "svm":
        if dataset in classification:
            measure(ctx, dataset, arm, lambda: arms.svm(ctx, dataset))
        return
    if arm == "fastai":
        run_stage1(ctx, "fastai")
    elif arm != "scratch" or dataset == "wikitext-2":
        run_stage1(ctx, "ours")
    for seed in ctx.seeds:
        if arm == "fastai":
            measure(ctx, dataset, arm, lambda s=seed: arms.fastai(ctx, dataset, s), seed)
        elif dataset in classification:
            measure(ctx, dataset, arm, lambda s=seed: arms.ours(ctx, dataset, arm, s), seed)
        elif arm != "stage1":
            measure(ctx, dataset, arm, lambda s=seed: arms.ours_wikitext(ctx, arm, s), seed)


def run_stage1(ctx, owner):
    """The general model of `owner` ("ours" or "fastai"), its record under the dataset name `general`."""
    if owner == "ours":
        measure(ctx, "general", "ours", lambda: arms.stage1(ctx))
        return
    if not (ctx.work / "tokens" / "general.npz").exists():
        export_tokens(ctx.data, ctx.work / "tokens", OURS, ctx.max_words)
    measure(ctx, "general", "fastai", lambda: arms.fastai_stage1(ctx))


def main(argv=None):
    ctx = parse(argv)
    if ctx.arm or ctx.export_tokens:
        ctx.data = data_folder(ctx.data)
        ctx.work.mkdir(parents=True, exist_ok=True)
    if ctx.export_tokens:
        export_tokens(ctx.data, ctx.work / "tokens", OURS, ctx.max_words)
        return
    if set(ctx.arm) - {"svm", "fastai", "pretrain-fastai"}:
        import torch

        torch.set_num_threads(ctx.threads)
    for arm in ctx.arm:
        if arm.startswith("pretrain"):
            run_stage1(ctx, "fastai" if arm.endswith("fastai") else "ours")
            continue
        for dataset in ctx.dataset:
            run_arm(ctx, dataset, arm)
    if ctx.report:
        print(table(load_all(ctx.results)))


if __name__ == "__main__":
    main()
