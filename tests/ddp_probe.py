"""ddp_probe.py RANK OF FOLDER: two steps of each model on this rank's share of the rows, gradients saved.

OF = 1 is one process alone with all rows, and no DistributedDataParallel.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ulmfit_fast as uf

V, E, H, ROWS = 30, 6, 10, 6
NO_DROPOUT = dict(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)


def language_model():
    model = uf.LanguageModel(uf.AWDLSTM(V, E, H, 2, **NO_DROPOUT), output_p=0.0)
    ids = torch.randint(V, (2, ROWS, 6))
    return model, lambda run, k, rows: run(ids[k, rows, :-1], ids[k, rows, 1:])[0]


def classifier(freeze=False, empty=False):
    """With a head that normalises by its running statistics: those of a batch depend on how it is shared."""
    model = uf.TextClassifier(uf.AWDLSTM(V, E, H, 2, **NO_DROPOUT), 3, bptt=4, max_len=6, ps=(0.0, 0.0))
    model[1].eval()
    if freeze:
        model[0].requires_grad_(False)
    ids, labels = torch.randint(V, (2, ROWS, 9)), torch.randint(3, (2, ROWS))
    lengths = torch.tensor([[9, 2, 7, 1, 5, 8], [3, 6, 2, 9, 9, 1]])
    if empty:
        lengths[:, ROWS // 2 :] = 0  # all of the second rank's
    return model, lambda run, k, rows: F.cross_entropy(run(ids[k, rows], lengths[k, rows]), labels[k, rows])


CASES = {
    "language model": (language_model, {}),
    "classifier": (classifier, {}),
    "frozen encoder": (lambda: classifier(freeze=True), {}),
    "empty documents": (lambda: classifier(empty=True), {"find_unused_parameters": True}),
}


def main(rank, of, folder):
    results = {}
    for name, (make, options) in CASES.items():
        torch.manual_seed(0)
        model, loss = make()
        model.double()
        run = DistributedDataParallel(model, **options) if of > 1 else model
        rows = slice(rank * ROWS // of, (rank + 1) * ROWS // of)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for k in range(2):  # a parameter without a gradient is an error in the second step
            optimizer.zero_grad()
            loss(run, k, rows).backward()
            optimizer.step()
        results[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        if name == "language model":
            results["hidden"] = model[0].hidden
    torch.save(results, f"{folder}/{rank}-of-{of}.pt")


if __name__ == "__main__":
    rank, of, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if of > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=of)
    main(rank, of, folder)
    if of > 1:
        dist.destroy_process_group()
