"""What a call must do at least: counted operations and bytes, and the time they take at measured rates.

Operations are multiplications and additions of the matrix products; the backward counts twice the forward.
Bytes count every input of a call read once and every result written once, whatever lies between.
"""

import torch

from ulmfit_fast.config import make_config


def layer_sizes(preset):
    """[(I, H)] of the preset's layers; ulmfit: 400 -> 1152, 1152 -> 1152, 1152 -> 400."""
    c = make_config("pretrain", preset)
    sizes = [c.emb_sz, *[c.n_hid] * (c.n_layers - 1), c.emb_sz]
    return list(zip(sizes[:-1], sizes[1:], strict=True))


def layer_flops(inputs, hidden, tokens):
    """Of a layer, forward and backward."""
    return 3 * 2 * tokens * 4 * hidden * (inputs + hidden)


def softmax_flops(words, features, tokens):
    return 3 * 2 * tokens * words * features


def products(preset, tokens, vocab=None):
    """{name: (m, k, n)} of the model's large forward products, (m, k) @ (k, n)."""
    sizes = layer_sizes(preset)
    shapes = {f"x to gates, {n_in} -> {n_out}": (tokens, n_in, 4 * n_out) for n_in, n_out in sizes}
    if vocab:
        shapes[f"softmax, {vocab} words"] = (tokens, sizes[-1][1], vocab)
    return shapes


def nbytes(*tensors):
    return sum(t.nbytes for t in tensors)


def step_bytes(parameters):
    """Of a training step: each weight, its gradient and both moments read, written once; activations not."""
    return 8 * sum(p.nbytes for p in parameters)


def base(precision):
    """The precision of the products: without what says that autocast chose it."""
    return precision.removesuffix("-autocast")


def add_floor(record, roof, flops=0, traffic=0):
    """Adds the counted work of a side's call, its least time, and that time's share of the median."""
    seconds = [traffic / (roof["copy_gb_s"] * 1e9)]
    if flops:
        seconds.append(flops / (roof[f"{base(record['precision'])}_gflops"] * 1e9))
    floor = 1e3 * max(seconds)
    counted = {"flops": flops, "bytes": traffic, "floor_ms": float(f"{floor:.4g}")}
    return record | counted | {"floor_share": round(floor / record["total_ms"]["median"], 3)}


def rows_read(ids, weight):
    """Bytes of the rows of an embedding that some ids name."""
    return torch.unique(ids).numel() * weight[0].nbytes
