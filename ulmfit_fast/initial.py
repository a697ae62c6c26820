"""What a language model starts from: the frequencies of words, or the rows of another vocabulary."""

import numpy as np
import torch

from .text import transfer_rows


def start_from_frequencies(model, docs):
    """Sets the decoder's bias to the log of each word's share of `docs`, arrays of indices.

    The tied embedding then need not learn how frequent words are. Otherwise Adam, which makes steps of one
    size whatever the gradient's, moves all rare words along one direction, until that is most of what their
    rows hold.
    """
    counts = torch.from_numpy(np.bincount(np.concatenate(docs), minlength=len(model[1].decoder.bias))) + 1
    with torch.no_grad():
        model[1].decoder.bias.copy_((counts / counts.sum()).log())


def transfer(state, old, new):
    """A language model's state dict for another vocabulary: known rows copied, new rows the mean of the old
    ones.

    state: keys as LanguageModel's; old, new: words in order. The decoder's bias is treated like the
    embedding.
    """
    rows = torch.from_numpy(transfer_rows(old, new))
    known = rows >= 0
    moved = dict(state)
    for key in ("0.encoder.weight", "0.encoder_dp.emb.weight", "1.decoder.weight", "1.decoder.bias"):
        weight = state[key].cpu()
        fresh = weight.mean(0, keepdim=True).expand(len(new), *weight.shape[1:]).clone()
        fresh[known] = weight[rows[known]]
        moved[key] = fresh
    return moved
