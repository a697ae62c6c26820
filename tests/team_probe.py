"""team_probe.py FOLDER, in each process that torchrun starts, or alone: runs of the stages, and what came of
them, saved in FOLDER/RANK-of-SIZE.pt.
"""

import os
import pathlib
import sys

import torch
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf

TEXTS, LABELS = sentences(42)
OFF = dict.fromkeys(("hidden_p", "input_p", "embed_p", "weight_p", "output_p"), 0.0)
LM = TINY | SIZES | OFF | dict(batch_size=5)  # 3 rows and 2
CLF = TINY | dict(from_scratch=True, batch_size=12, epochs=6, lr=0.03)


def state(result):
    weights = {name: tensor.clone() for name, tensor in result.model.state_dict().items()}
    lines = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in result.history]
    return {"weights": weights, "lines": lines}


def interrupted(stage, *arguments, step, **options):
    """The run, stopped after `step` by the callback of one process, and gone on with."""

    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    try:
        stage(*arguments, callback=stop, **options)
    except KeyboardInterrupt as reason:
        said = str(reason)
    return {**state(stage(*arguments, resume=True, **options)), "said": said}


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def main(folder, rank, size):
    out = folder / f"of-{size}"
    lm = uf.pretrain_lm(TEXTS, out / "lm", valid=TEXTS[:9], **LM)
    few = uf.pretrain_lm(TEXTS[:4], out / "few", **LM | dict(bptt=20))  # a stream of fewer columns
    tuned = uf.finetune_lm(out / "lm", TEXTS, out / "tuned", valid=TEXTS[:9], **TINY | OFF)
    base, labelled = (out / "lm", TEXTS), (out / "tuned", TEXTS, LABELS)
    clf = CLF | dict(valid=(TEXTS, LABELS))
    found = {
        "lm": state(lm),
        "few columns": state(few),
        "tuned": state(tuned),
        "dropout": state(uf.finetune_lm(*base, out / "whole", **TINY)),
        "dropout, resumed": interrupted(uf.finetune_lm, *base, out / "parts", step=5, **TINY),
        "classifier": state(uf.train_classifier(*labelled, out / "clf", **clf)),
        "classifier, resumed": interrupted(uf.train_classifier, *labelled, out / "clf-parts", step=9, **clf),
        "lm, loaded": state(uf.pretrain_lm(TEXTS, out / "lm", valid=TEXTS[:9], resume=True, **LM)),
        "errors": {
            "taken": error_of(lambda: uf.pretrain_lm(TEXTS, out / "lm", **LM)),
            "diverged": error_of(lambda: uf.pretrain_lm(TEXTS, out / "bad", **LM | dict(lr=1e30, clip=0.0))),
        },
    }
    if size > 1:
        found["errors"] |= {
            "other data": error_of(lambda: uf.pretrain_lm(TEXTS[rank:], out / "other", **LM)),
            "other options": error_of(lambda: uf.pretrain_lm(TEXTS, out / "other", **LM | dict(lr=1 + rank))),
        }
    torch.save(found, folder / f"{rank}-of-{size}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(pathlib.Path(sys.argv[1]), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
