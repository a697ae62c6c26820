"""NumPy's numbers are numbers, a bool is none; lengths may be int32; seeds and sizes are checked."""

import numpy as np
import pytest
import torch
from checks import DEVICE, randn

import ulmfit_fast as uf

HALF, THREE = np.float32(0.5), np.int64(3)


def same(a, b):
    assert all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b)


def lstm_inputs():
    return randn(4, 2, 5), None, None, randn(12, 5), randn(12, 3)


def test_ops_take_numpys_numbers():
    x, ids = randn(2, 3, 4), torch.tensor([0, 3, 3, 1], device=DEVICE)
    same(uf.variational_dropout(x, HALF, seed=THREE), uf.variational_dropout(x, 0.5, seed=3))
    weight = randn(5, 4)
    same(
        uf.embedding_dropout(weight, ids, HALF, seed=THREE, padding_idx=THREE),
        uf.embedding_dropout(weight, ids, 0.5, seed=3, padding_idx=3),
    )
    options = dict(ignore_index=3, label_smoothing=0.5, chunk_rows=3)
    numpys = dict(ignore_index=THREE, label_smoothing=HALF, chunk_rows=THREE)
    h = randn(4, 4)
    same(*(uf.linear_cross_entropy(h, weight, None, ids, **kwargs) for kwargs in (options, numpys)))
    options = dict(weight_p=0.5, seed=3, dropout_p=0.5, dropout_seed=3)
    numpys = dict(weight_p=HALF, seed=THREE, dropout_p=HALF, dropout_seed=THREE)
    same(*(uf.lstm(*lstm_inputs(), **kwargs) for kwargs in (options, numpys)))
    expected = uf.dropout_mask(3, (3, 3), 0.5)
    for shape in ((THREE, THREE), np.array([3, 3]), torch.Size([3, 3])):
        same(uf.dropout_mask(THREE, shape, HALF), expected)
    same(uf.dropout_mask(3, THREE, HALF), uf.dropout_mask(3, 3, 0.5))


def test_modules_take_numpys_numbers():
    torch.manual_seed(0)
    lm = uf.LanguageModel(uf.AWDLSTM(np.int64(30), np.int32(6), np.int64(16), np.int8(2), weight_p=HALF))
    assert [type(lm[0].n_hid), type(lm[0].pad_token)] == [int, int]
    lm.to(DEVICE)
    ids = torch.tensor([[2, 3, 4]], device=DEVICE)
    same(lm[0](ids, seed=THREE), lm.reset() or lm[0](ids, seed=3))
    lstm = uf.WeightDropLSTM(THREE, THREE, weight_p=HALF, device=DEVICE, dtype=torch.float64)
    same(lstm(randn(2, 1, 3), seed=THREE)[0], lstm(randn(2, 1, 3), seed=3)[0])
    assert uf.TextClassifier(lm[0], THREE)(ids).shape == (1, 3)


def test_lengths_may_be_int32():
    lengths = torch.tensor([3, 0], device=DEVICE)
    inputs = lstm_inputs()
    same(*(uf.lstm(*inputs, lengths=n) for n in (lengths, lengths.int())))
    x = randn(2, 4, 5)
    pooled = []
    for n in (lengths, lengths.int()):
        leaf = x.clone().requires_grad_()
        pooled.append(uf.concat_pool(leaf, n))
        pooled[-1].sum().backward()
    same(*pooled)
    encoder = uf.AWDLSTM(30, 6, 10, 2).to(DEVICE).eval()
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]], device=DEVICE)
    same(encoder(ids, lengths=lengths.int()), encoder.reset() or encoder(ids, lengths=lengths))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: uf.AWDLSTM("50"), TypeError, "vocab_sz must be an int, got str"),
        (lambda: uf.AWDLSTM(50, n_layers=True), TypeError, "n_layers must be an int, got bool"),
        (lambda: uf.AWDLSTM(50, pad_token="1"), ValueError, "pad_token must be None or in .*, got '1'"),
        (lambda: uf.WeightDropLSTM(3, 4)([1, 2]), TypeError, "input must be a tensor, got list"),
        (lambda: uf.AWDLSTM(50, 4, 4, 1)([[1, 2]]), TypeError, "inp must be a tensor, got list"),
        (lambda: uf.dropout_mask(1, 2.0, 0.5), TypeError, "shape must be integers, got 2.0"),
        (lambda: uf.dropout_mask(1, (True,), 0.5), TypeError, "shape must be integers"),
        (lambda: uf.TextClassifier(uf.AWDLSTM(50, 4, 4, 1), "2"), TypeError, "n_classes must be an int"),
        (
            lambda: uf.TextClassifier.from_language_model(uf.AWDLSTM(50, 4, 4, 1), 2),
            TypeError,
            "lm must be a LanguageModel .*, got AWDLSTM",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("seed", [1.5, True, "1", 2**63, torch.tensor(1.5), torch.tensor([1])])
def test_modules_refuse_seeds_as_the_ops_do(seed):
    seed = seed.to(DEVICE) if isinstance(seed, torch.Tensor) else seed
    lstm = uf.WeightDropLSTM(3, 4, weight_p=0.5, device=DEVICE, dtype=torch.float64)
    encoder, ids = uf.AWDLSTM(50, 4, 4, 1).to(DEVICE), torch.zeros(1, 2, dtype=torch.int64)
    for call in (
        lambda: lstm(randn(2, 1, 3), seed=seed),
        lambda: encoder(ids.to(DEVICE), seed=seed),
        lambda: uf.variational_dropout(randn(2, 1, 3), 0.5, seed=seed),
    ):
        with pytest.raises(ValueError if seed == 2**63 else TypeError, match="seed must"):
            call()
