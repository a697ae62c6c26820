"""The oracle itself: against published numbers, torch's own modules in fp64, and plain loops."""

import numpy as np
import pytest
import torch
from checks import DEVICE, mask64, randn
from torch import nn
from torch.nn import functional as F

from ulmfit_fast import reference


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # known answers of Random123, the authors' library (kat_vectors, philox4x32 10)
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox4x32(np.array(counter, dtype=np.uint64).reshape(4, 1), key)
    assert words[:, 0].tolist() == expected


@pytest.mark.parametrize("element", [0, 15, 16, 63, 64, 1000])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3])
def test_mask_is_a_function_of_the_element_alone(element, seed):
    """The contract's definition, spelled out for one element."""
    group, rest = divmod(element, 64)
    counter = np.array([group * 16 + rest % 16, 0, 0, 0], dtype=np.uint64).reshape(4, 1)
    unsigned = seed % 2**64
    word = int(reference.philox4x32(counter, (unsigned & 0xFFFFFFFF, unsigned >> 32))[rest // 16, 0])
    for p in (0.1, 0.5, 0.9):
        expected = 0.0 if word < int(p * 2**32) else 1 / (1 - p)
        assert reference.philox_mask(seed, (element + 1,), p)[element] == expected


@pytest.mark.parametrize("reverse", [False, True])
def test_lstm_is_torch_lstm_with_packed_sequences(reverse):
    time, batch, inputs, hidden = 6, 4, 5, 7
    module = nn.LSTM(inputs, hidden, bidirectional=True, dtype=torch.float64, device=DEVICE)
    lengths = torch.tensor([6, 1, 4, 3])  # torch wants them on the CPU
    x, h0, c0 = randn(time, batch, inputs), randn(2, batch, hidden), randn(2, batch, hidden, seed=1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, (h_n, c_n) = module(packed, (h0, c0))
    y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=time)
    suffix, d = ("l0_reverse", 1) if reverse else ("l0", 0)
    weights = [getattr(module, f"{n}_{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    ours = reference.lstm(x, h0[d], c0[d], *weights, lengths=lengths.to(DEVICE), reverse=reverse)
    theirs = y[..., d * hidden : (d + 1) * hidden], h_n[d], c_n[d]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lstm_mask_and_layout():
    x, w_ih, w_hh = randn(3, 2, 5), randn(16, 5), randn(16, 4)
    mask = mask64(1, (16, 4), 0.5)
    y, h, c = reference.lstm(x, None, None, w_ih, w_hh, mask=mask)
    y2, h2, c2 = reference.lstm(x.transpose(0, 1), None, None, w_ih, w_hh * mask, batch_first=True)
    assert torch.equal(y, y2.transpose(0, 1)) and torch.equal(h, h2) and torch.equal(c, c2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy_is_torch_cross_entropy(reduction, bias):
    h, weight, b = randn(3, 4, 6), randn(10, 6), randn(10) if bias else None
    target = torch.randint(10, (3, 4), device=DEVICE)
    target[0, 1] = target[2, 3] = 2
    ours = reference.linear_cross_entropy(
        h, weight, b, target, ignore_index=2, label_smoothing=0.2, reduction=reduction
    )
    theirs = F.cross_entropy(
        F.linear(h, weight, b).flatten(0, 1),
        target.flatten(),
        ignore_index=2,
        label_smoothing=0.2,
        reduction=reduction,
    )
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-12, atol=1e-12)


def test_concat_pool_is_a_loop():
    out, lengths = randn(4, 5, 3), torch.tensor([5, 0, 1, 3], device=DEVICE)
    pooled = reference.concat_pool(out, lengths)
    for b, n in enumerate(lengths.tolist()):
        part = out[b, :n]
        expected = torch.cat([part[-1], part.amax(0), part.mean(0)]) if n else out.new_zeros(9)
        torch.testing.assert_close(pooled[b], expected, rtol=1e-14, atol=0)
    assert reference.concat_pool(out[:, :0], torch.zeros_like(lengths)).eq(0).all()


def test_embedding_and_variational_dropout():
    weight, ids = randn(9, 4), torch.randint(9, (2, 3), device=DEVICE)
    mask = mask64(0, (9,), 0.5)
    assert torch.equal(
        reference.embedding_dropout(weight, ids, mask), F.embedding(ids, weight) * mask[ids].unsqueeze(-1)
    )
    x, mask = randn(2, 3, 4), mask64(0, (2, 4), 0.5)
    ours = reference.variational_dropout(x, mask)
    assert all(torch.equal(ours[:, t], x[:, t] * mask) for t in range(3))
    assert torch.equal(
        reference.variational_dropout(x.transpose(0, 1), mask, batch_first=False), ours.transpose(0, 1)
    )
