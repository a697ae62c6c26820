"""From arrays of token indices to batches: the language model's contiguous stream and length-sorted
documents.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .text import PAD_ID

IGNORE = -100
Docs = Sequence[np.ndarray]  # the indices of each document


class Batches(Protocol):
    """Those of an epoch, in their order."""

    def __len__(self) -> int: ...
    def __getitem__(self, k: int) -> tuple[Tensor, ...]: ...


class TokenStream:
    """All texts as one stream, cut into `batch_size` columns that are read side by side in windows of `bptt`
    tokens.

    Window k of an epoch continues window k - 1 in every column, so the hidden state can be carried. A stream
    shorter than batch_size windows gets fewer columns. `len` is the number of windows; window k is (ids,
    targets), both (columns, T) int64 with T = bptt but for the last.
    """

    def __init__(self, docs: Docs, batch_size: int, bptt: int) -> None:
        stream = np.concatenate(docs) if len(docs) else np.zeros(0, np.int32)
        if len(stream) < 3:
            raise ValueError(
                f"the text is too short: {len(stream)} tokens, a language model needs at least 3"
            )
        columns = max(1, min(batch_size, (len(stream) - 1) // bptt))
        length = (
            len(stream) - 1
        ) // columns  # targets per column; the few tokens after the last column are left out
        self.ids = torch.from_numpy(stream[: columns * length].reshape(columns, length))
        self.targets = torch.from_numpy(stream[1 : columns * length + 1].reshape(columns, length))
        self.bptt, self.length = bptt, length

    def __len__(self) -> int:
        return -(-self.length // self.bptt)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        window = slice(k * self.bptt, (k + 1) * self.bptt)
        return self.ids[:, window].long(), self.targets[:, window].long()


def epoch_stream(docs: Docs, batch_size: int, bptt: int, seed: int, epoch: int, shuffle: bool) -> TokenStream:
    """The stream of one epoch, a function of (seed, epoch) alone.

    shuffle: a new order of the texts. Otherwise the order stays and the stream begins at another text each
    epoch, so that the edges of windows and columns fall elsewhere.
    """
    rng = np.random.default_rng([seed, epoch])
    if shuffle:
        docs = [docs[i] for i in rng.permutation(len(docs))]
    elif epoch and len(docs) > 1:
        first = int(rng.integers(len(docs)))
        docs = [*docs[first:], *docs[:first]]
    return TokenStream(docs, batch_size, bptt)


def evaluation_windows(docs: Docs, batch_size: int, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows (ids, targets) that score every token of the stream but its first exactly once.

    Columns beyond the end are filled with xxpad whose target is IGNORE.
    """
    stream = np.concatenate(docs)
    n = len(stream) - 1
    if n < 1:
        raise ValueError(f"texts hold {len(stream)} tokens; a perplexity needs at least 2")
    columns = max(1, min(batch_size, n))
    length = -(-n // columns)
    ids, targets = np.full(columns * length, PAD_ID, np.int64), np.full(columns * length, IGNORE, np.int64)
    ids[:n], targets[:n] = stream[:-1], stream[1:]
    rows = torch.from_numpy(ids.reshape(columns, length))
    answers = torch.from_numpy(targets.reshape(columns, length))
    for start in range(0, length, bptt):
        yield rows[:, start : start + bptt], answers[:, start : start + bptt]


def pad_batch(docs: Docs) -> tuple[Tensor, Tensor]:
    """(ids (B, T) int64 padded on the right with xxpad, lengths (B,) int64) of some documents."""
    # on the host, whatever torch's default device is
    lengths = torch.tensor([len(d) for d in docs], dtype=torch.int64, device="cpu")
    ids = torch.full((len(docs), int(lengths.max())), PAD_ID, dtype=torch.int64, device="cpu")
    for row, doc in zip(ids, docs, strict=True):
        row[: len(doc)] = torch.from_numpy(doc)
    return ids, lengths


def shuffled_buckets(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Index lists of batches of like length in random order, a function of (seed, epoch) alone.

    The documents are shuffled, sorted by length within pools of 50 batches, cut into batches, and the batches
    shuffled: little padding, and different batches in each epoch. A last batch of a single
    document joins the one before it, since batch norm needs two.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    order = rng.permutation(len(lengths))
    pool = 50 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool].tolist(), key=lambda i: -lengths[i])
        batches += [part[k : k + batch_size] for k in range(0, len(part), batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        single = batches.pop()
        batches[-1] += single
    return [batches[i] for i in rng.permutation(len(batches))]


class DocumentBatches:
    """Batches (ids, lengths, classes) of one epoch of labelled documents."""

    def __init__(self, docs: Docs, targets: Sequence[int], batch_size: int, seed: int, epoch: int) -> None:
        self.docs, self.targets = docs, targets
        self.order = shuffled_buckets([len(d) for d in docs], batch_size, seed, epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.order[k]
        targets = torch.tensor([self.targets[i] for i in chosen], device="cpu")
        return *pad_batch([self.docs[i] for i in chosen]), targets
