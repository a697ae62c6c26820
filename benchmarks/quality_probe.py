"""What stage 2 does to the encoder itself: TREC-6 accuracy of a linear classifier on its frozen features.

    python -m benchmarks.quality_probe --work runs/quality --seeds 0 1 2

Uses the models that the arms `stage1` and `full` of benchmarks.quality left in --work. Features are
concat-pooled outputs of the language model's encoder, the classifier is logistic regression, so nothing of
the encoder moves: what stage 3 can make up for by training all layers shows here. Beside it the perplexity of
the questions under each language model.
"""

import argparse
from pathlib import Path

from .quality_data import PROBE, data_folder, read_split
from .record import RESULTS, provenance, record_path, save

ARMS = ("fresh", "stage1", "stage2")


def features(encoder, docs, batch_size=64):
    """float64 (len(docs), 3 * emb_sz): [last, max, mean] over each document, without dropout."""
    import torch

    from ulmfit_fast.batches import pad_batch
    from ulmfit_fast.classifier import SentenceEncoder

    reader = SentenceEncoder(encoder).eval()
    with torch.no_grad():
        parts = [
            reader(*pad_batch(docs[start : start + batch_size])) for start in range(0, len(docs), batch_size)
        ]
    return torch.cat(parts).double().numpy()


def probe(lm, train, test):
    """Accuracy on `test` of logistic regression trained on `train`, both (texts, labels)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    encode = lm.tokenizer.encode
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(features(lm.model[0], encode(train[0])), train[1])
    return float(model.score(features(lm.model[0], encode(test[0])), test[1]))


def language_model(work, arm, seed):
    """The model of `arm`; `fresh` is stage 1's with weights drawn anew."""
    import torch

    import ulmfit_fast as uf
    from ulmfit_fast.results import build_lm

    lm = uf.load(work / (f"trec-6-lm-seed{seed}" if arm == "stage2" else "stage1"))
    if arm == "fresh":
        torch.manual_seed(seed)
        fresh = build_lm(lm.config.model_config(), len(lm.tokenizer), lm.config.dropouts())
        lm.model.load_state_dict(fresh.state_dict())
    return lm


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m benchmarks.quality_probe", description=__doc__.split("\n")[0])
    p.add_argument("--data", help="as for benchmarks.quality")
    p.add_argument("--work", type=Path, default=Path("runs/quality"))
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = p.parse_args(argv)
    import torch

    data = data_folder(args.data)
    train, test = (read_split(data, "trec-6", split) for split in ("train", "test"))
    for seed in args.seeds:
        where = provenance(torch.get_num_threads())
        record = {"dataset": PROBE, "arm": "probe", "seed": seed, "dtype": "float32"}
        record |= {"accuracy": {}, "perplexity": {}}
        for arm in ARMS:
            lm = language_model(args.work, arm, seed)
            record["accuracy"][arm] = probe(lm, train, test)
            record["perplexity"][arm] = lm.perplexity(test[0])
        save(record_path(args.results, PROBE, "probe", seed), {**record, **where})
        print(seed, record["accuracy"], record["perplexity"])


if __name__ == "__main__":
    main()
