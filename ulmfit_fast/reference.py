"""Every op of `ulmfit_fast` again in plain torch, with the dropout mask given: oracle and specification.

Each function takes the arguments of the public op, with `mask` in place of `p` and `seed`; the mask the op
used is `philox_mask(seed, shape, p)`.  The functions compute in the dtype of their inputs, differentiate
through autograd and are written to be read: no fusion, no chunks, one loop over time.
"""

import numpy as np
import torch
from torch import Tensor

LANES = 16  # counters of one group, so that a vector of 16 generates 64 consecutive elements
GROUP = 4 * LANES  # elements of one group: each counter gives four 32-bit words


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter: uint64 (4, n), each below 2**32; key: two words below 2**32.  Returns uint64 (4, n), each below
    2**32.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def philox_uniform(seed: int, n: int) -> np.ndarray:
    """The 32-bit random word of each of the elements 0..n-1, as uint64 (n,).

    Element e lies in group e // 64; r = e % 64 selects lane r % 16 and word r // 16.  The counter of a lane
    is group * 16 + lane (64 bit, low word first), the key is the seed (low word first).
    """
    groups = -(-n // GROUP)
    position = np.arange(groups * LANES, dtype=np.uint64)
    zero = np.zeros_like(position)
    counter = np.stack([position & np.uint64(0xFFFFFFFF), position >> np.uint64(32), zero, zero])
    seed = int(seed) % 2**64
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    # (word, group, lane) -> (group, word, lane): consecutive elements run over the lanes first
    return words.reshape(4, groups, LANES).transpose(1, 0, 2).reshape(-1)[:n]


def philox_mask(seed: int, shape: tuple[int, ...], p: float) -> np.ndarray:
    """Dropout mask of a row-major tensor of `shape`: 0 with probability p, else 1/(1-p); float64.

    An element is dropped iff its random word is below floor(p * 2**32).
    """
    n = int(np.prod(shape, dtype=np.int64))
    kept = philox_uniform(seed, n) >= np.uint64(int(p * 2.0**32))
    return (kept * (1.0 / (1.0 - p))).reshape(shape)


def dropout_mask(
    seed: int,
    shape: tuple[int, ...],
    p: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """`philox_mask` as a tensor of `dtype`."""
    return torch.from_numpy(philox_mask(int(seed), tuple(shape), p)).to(device=device, dtype=dtype)


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reverse: bool = False,
    output_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One LSTM layer in one direction, with DropConnect (Merity et al. 2017) on the recurrent weight.

    x (T, B, I), or (B, T, I) with batch_first; h0, c0 (B, H) or None for zeros; w_ih (4H, I), w_hh (4H, H),
    b_ih, b_hh (4H), rows in torch's order of the gates: i, f, g, o; mask (4H, H) multiplies w_hh; lengths
    (B,): a step at or after a sequence's length carries the state and outputs zeros.  With reverse, each
    sequence is read from its last valid step back.  Returns y (like x, with H features), h_n and c_n (B,
    H); where output_mask (B, H) is given, also `variational_dropout` of y with it.
    """
    if batch_first:
        x = x.transpose(0, 1)
    steps, batch, _ = x.shape
    hidden = w_hh.shape[1]
    h = x.new_zeros(batch, hidden) if h0 is None else h0
    c = x.new_zeros(batch, hidden) if c0 is None else c0
    w_hh = w_hh if mask is None else w_hh * mask
    outputs: list[Tensor] = [h] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        z = x[t] @ w_ih.t() + h @ w_hh.t()
        if b_ih is not None:
            z = z + b_ih
        if b_hh is not None:
            z = z + b_hh
        i, f, g, o = z.chunk(4, dim=1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * c_new.tanh()
        if lengths is None:
            h, c, outputs[t] = h_new, c_new, h_new
        else:
            valid = (t < lengths).unsqueeze(1)
            h, c = torch.where(valid, h_new, h), torch.where(valid, c_new, c)
            outputs[t] = torch.where(valid, h_new, torch.zeros_like(h_new))
    y = torch.stack(outputs) if steps else x.new_zeros(0, batch, hidden)
    y = y.transpose(0, 1) if batch_first else y
    if output_mask is None:
        return y, h, c
    return y, h, c, variational_dropout(y, output_mask, batch_first=batch_first)


def embedding_dropout(
    weight: Tensor, ids: Tensor, mask: Tensor | None = None, *, padding_idx: int | None = None
) -> Tensor:
    """Rows `ids` of weight (V, E), each scaled by its entry of mask (V,): whole words are dropped (Gal 2016).

    Returns (*ids.shape, E).  The row padding_idx receives no gradient.
    """
    dropped = weight if mask is None else weight * mask.unsqueeze(1)
    return torch.nn.functional.embedding(ids, dropped, padding_idx)


def variational_dropout(x: Tensor, mask: Tensor | None = None, *, batch_first: bool = True) -> Tensor:
    """x (B, T, *), or (T, B, *) with batch_first=False, times one mask (B, F) for all time steps.

    F is the product of the trailing sizes.
    """
    if mask is None:
        return x.clone()
    batch, time = (x.shape[0], 1) if batch_first else (x.shape[1], 0)
    return x * mask.reshape(batch, *x.shape[2:]).unsqueeze(time)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the logits h @ weight.T + bias against target: `F.cross_entropy(F.linear(...))`.

    h (..., E), weight (V, E), bias (V) or None, target (...) int64.  A position whose target is
    ignore_index has loss 0 and does not count in the mean; a mean over no position is 0 (torch gives NaN).
    With label_smoothing s the target distribution is 1-s on the target plus s/V everywhere.  reduction
    "mean", "sum" or "none".
    """
    logits = h @ weight.t()
    if bias is not None:
        logits = logits + bias
    log_p = logits.log_softmax(-1)
    counts = target != ignore_index
    index = torch.where(counts, target, torch.zeros_like(target))
    loss = -log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    loss = torch.where(counts, loss, torch.zeros_like(loss))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp(min=1)


def concat_pool(out: Tensor, lengths: Tensor) -> Tensor:
    """[last, max, mean] of out (B, T, H) over the first lengths[b] steps: (B, 3H) (Howard and Ruder 2018).

    A sequence of length 0 gives zeros.  On a tie the first step is the maximum and has its gradient.
    """
    batch, steps, hidden = out.shape
    if steps == 0:
        return out.new_zeros(batch, 3 * hidden)
    lengths = lengths.reshape(batch, 1, 1)
    time = torch.arange(steps, device=out.device).reshape(1, steps, 1)
    valid = time < lengths
    some = lengths.squeeze(2) > 0
    last = out.gather(1, (lengths - 1).clamp(min=0).expand(batch, 1, hidden)).squeeze(1)
    first_maximum = out.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    largest = out.gather(1, first_maximum).squeeze(1)
    mean = torch.where(valid, out, torch.zeros_like(out)).sum(1) / lengths.squeeze(2).clamp(min=1)
    return torch.cat([torch.where(some, part, torch.zeros_like(part)) for part in (last, largest, mean)], 1)
