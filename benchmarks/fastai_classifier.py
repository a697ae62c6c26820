"""fastai's own classifier pipeline with its AWD_LSTM and with ours: accuracy and seconds, side by side.

fastai does everything but the model: tokens, vocabulary, batches, learners, optimizer, schedules.  Language
model on the training texts (one frozen epoch at 10 * lr, the rest unfrozen), `save_encoder`, then the
classifier as fastai's tutorial unfreezes it.  Arms: `fastai`; `ours`, the same with
`ulmfit_fast.fastai.AWD_LSTM`; `accelerated`, fastai's learners after `accelerate(learn)`.  For each seed they
take turns in one process, on the same tokens in the same order.

    python -m benchmarks.fastai_classifier --data DATA --dataset trec-6 --seeds 0 1 2
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from .arguments import positive
from .quality_data import CLASSIFICATION, FEW, cut_words, data_folder, read_split
from .quality_fastai import import_fastai
from .record import RESULTS, provenance, save

ARMS = ("fastai", "ours", "accelerated")
DOWN = 2.6**4  # the rate of the lowest group is the highest one's over this


def loaders(ft, args):
    """(language model's, classifier's) DataLoaders over one vocabulary; the test part validates."""
    import pandas

    frames = []
    for split in ("train", "test"):
        texts, labels = read_split(data_folder(args.data), args.dataset, split)
        texts = cut_words(texts, args.max_words)[: args.max_docs]
        frames.append(
            pandas.DataFrame({"text": texts, "label": labels[: args.max_docs], "is_valid": split == "test"})
        )
    df = pandas.concat(frames, ignore_index=True)
    options = dict(
        path=args.work, text_col="text", valid_col="is_valid", seq_len=args.bptt, bs=args.batch_size
    )
    options |= dict(device=torch.device("cpu"), num_workers=0)  # the seconds hold all of the work
    lm = ft.TextDataLoaders.from_df(df, is_lm=True, **options)
    return lm, ft.TextDataLoaders.from_df(df, label_col="label", text_vocab=lm.vocab, **options)


def learner(ft, arm, make, dls, config, args, **options):
    from ulmfit_fast.fastai import AWD_LSTM, accelerate

    sizes = dict(emb_sz=args.emb_sz, n_hid=args.n_hid, n_layers=args.n_layers)
    learn = make(
        dls,
        AWD_LSTM if arm == "ours" else ft.AWD_LSTM,
        config={**config, **sizes},
        pretrained=False,
        path=args.work,
        drop_mult=args.drop_mult,
        **options,
    )
    learn.remove_cb(ft.ProgressCallback)
    return accelerate(learn) if arm == "accelerated" else learn


def fit(learn, plan):
    """(seconds, CPU seconds, last epoch's values) of the fits in plan: (prepare, epochs, rate)."""
    start, cpu = time.perf_counter(), time.process_time()
    with learn.no_logging():
        for prepare, epochs, rate in plan:
            if epochs > 0:
                prepare()
                learn.fit_one_cycle(epochs, rate)
    seconds = time.perf_counter() - start, time.process_time() - cpu
    return *(round(s, 2) for s in seconds), [round(v, 4) for v in learn.recorder.values[-1]]


def run(ft, arm, seed, lm_dls, clas_dls, args):
    """One arm with one seed: language model, then classifier."""
    ft.set_seed(seed, reproducible=True)
    lm_dls.train.items.idxs.sort()  # fastai shuffles them in place
    learn = learner(ft, arm, ft.language_model_learner, lm_dls, ft.awd_lstm_lm_config, args)
    rate = args.lm_lr
    plan = [(learn.freeze, 1, 10 * rate), (learn.unfreeze, args.lm_epochs - 1, rate)]
    lm_wall, lm_cpu, lm_values = fit(learn, plan)
    learn.save_encoder("encoder")
    ft.set_seed(seed, reproducible=True)
    learn = learner(
        ft,
        arm,
        ft.text_classifier_learner,
        clas_dls,
        ft.awd_lstm_clas_config,
        args,
        metrics=ft.accuracy,
        seq_len=args.bptt,
    )
    learn.load_encoder("encoder")
    rate = args.lr
    plan = [
        (learn.freeze, 1, 2 * rate),
        (lambda: learn.freeze_to(-2), 1, slice(rate / DOWN, rate)),
        (lambda: learn.freeze_to(-3), 1, slice(rate / 2 / DOWN, rate / 2)),
        (learn.unfreeze, args.epochs - 3, slice(rate / 10 / DOWN, rate / 10)),
    ]
    wall, cpu, values = fit(learn, plan)
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": values[-1],
        "classifier_loss": values[1],
        "lm_loss": lm_values[1],
        "seconds": {"lm": lm_wall, "classifier": wall},
        "cpu_seconds": {"lm": lm_cpu, "classifier": cpu},
    }


def report(runs):
    """The table: of each arm accuracy, mean and standard deviation over seeds, and median seconds."""
    lines = [f"{'arm':12} {'seeds':>5} {'accuracy %':>14} {'lm s':>9} {'classifier s':>13}"]
    for arm in dict.fromkeys(r["arm"] for r in runs):
        mine = [r for r in runs if r["arm"] == arm]
        scores = [100 * r["accuracy"] for r in mine]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        seconds = [statistics.median(r["seconds"][stage] for r in mine) for stage in ("lm", "classifier")]
        accuracy = f"{statistics.mean(scores):.1f}{spread}"
        lines.append(f"{arm:12} {len(mine):5} {accuracy:>14} {seconds[0]:9.1f} {seconds[1]:13.1f}")
    return "\n".join(lines)


def table(record):
    """The record's runs in Markdown: accuracy, mean and standard deviation over seeds, and mean seconds."""
    lines = ["| arm | accuracy % | seconds: language model | classifier | both |", "|---|---|---|---|---|"]
    for arm in dict.fromkeys(r["arm"] for r in record["runs"]):
        mine = [r for r in record["runs"] if r["arm"] == arm]
        scores = [100 * r["accuracy"] for r in mine]
        spread = f" ± {statistics.stdev(scores):.1f} ({len(scores)})" if len(scores) > 1 else ""
        seconds = [statistics.mean(r["seconds"][stage] for r in mine) for stage in ("lm", "classifier")]
        cells = [f"{s:.0f}" for s in (*seconds, sum(seconds))]
        lines.append(f"| {' | '.join([arm, f'{statistics.mean(scores):.1f}{spread}', *cells])} |")
    return "\n".join(lines)


def parse(argv):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", type=Path, help="folder laid out as benchmarks/README.md says")
    p.add_argument("--dataset", choices=[*CLASSIFICATION, FEW], default="trec-6")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=["fastai", "ours"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--lm-epochs", type=positive, default=2, help="the frozen one included")
    p.add_argument("--epochs", type=positive, default=5, help="of the classifier, three partly frozen")
    p.add_argument("--lm-lr", type=float, default=2e-3)
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--drop-mult", type=float, default=0.5)
    p.add_argument("--batch-size", type=positive, default=32)
    p.add_argument("--bptt", type=positive, default=72)
    p.add_argument("--emb-sz", type=positive, default=200)
    p.add_argument("--n-hid", type=positive, default=576)
    p.add_argument("--n-layers", type=positive, default=3)
    p.add_argument("--max-docs", type=positive, help="of each part")
    p.add_argument("--max-words", type=positive, help="first and last half of them of longer documents")
    p.add_argument("--threads", type=positive, default=torch.get_num_threads())
    p.add_argument("--results", type=Path, default=RESULTS, help="where the record goes")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(args.threads)
    ft = import_fastai()
    with tempfile.TemporaryDirectory() as args.work:
        lm_dls, clas_dls = loaders(ft, args)
        runs = []
        for seed in args.seeds:
            for arm in args.arms:
                runs.append(run(ft, arm, seed, lm_dls, clas_dls, args))
                print(f"{runs[-1]}", flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "work", "results", "threads")}
    record = {"benchmark": "fastai_classifier", "dtype": "float32", **provenance(args.threads)}
    record |= {"vocab_sz": len(lm_dls.vocab), "train_documents": len(clas_dls.train_ds)}
    record |= {"test_documents": len(clas_dls.valid_ds), "hyper_parameters": settings, "runs": runs}
    path = args.results / f"fastai-classifier-{args.dataset}-threads{args.threads}.json"
    save(path, record, show=False)
    print(report(runs))


if __name__ == "__main__":
    main()
