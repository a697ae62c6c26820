"""One process of test_fastai_distributed.py: trains with `distrib_ctx`, saves losses and weights.

Usage: fastai_ranks.py DATA OUT, with torchrun's variables set.
"""

import os
import pathlib
import sys

import torch
from checks_fastai import OURS, THEIRS, classifier, lm_learner, reviews
from fastai.distributed import DistributedDL

from ulmfit_fast.fastai import accelerate


def broadcast(self, values, rank):
    """DistributedDL._broadcast by way of the CPU; fastai's goes by way of CUDA alone."""
    values = torch.tensor(values)
    torch.distributed.broadcast(values, rank)
    return values.tolist()


def without_short_batch(dl):
    """DistributedDL mixes the language model's batches, and cannot collate a short one with the others."""
    dl.n, dl.n_batches, dl.last_len = dl.n - dl.bs, dl.n_batches - 1, dl.seq_len


def trained(learn):
    start = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_logging(), learn.no_bar(), learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(2, 1e-2)
    losses = torch.Tensor(torch.stack(learn.recorder.losses))
    parameters = [p.detach() for p in learn.model.parameters()]
    moved = all(not torch.equal(p, before) for p, before in zip(parameters, start, strict=True))
    return {"losses": losses, "parameters": parameters, "moved": moved}


def main(data, out):
    DistributedDL._broadcast = broadcast
    data = pathlib.Path(data)
    lm, clas = reviews(data, is_lm=True), reviews(data)
    for dl in lm.loaders:
        without_short_batch(dl)
    torch.manual_seed(0)
    record = {
        "language model, fused": trained(accelerate(lm_learner(lm, THEIRS))),
        "classifier": trained(classifier(clas, OURS)),
        "batches": {"language model, fused": len(lm.train), "classifier": len(clas.train)},
    }
    torch.save(record, pathlib.Path(out) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
