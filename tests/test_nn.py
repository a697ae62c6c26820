"""WeightDropLSTM against torch.nn.LSTM, and the two dropout modules."""

import copy
import pickle

import pytest
import torch
from checks import DEVICE, random_state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ulmfit_fast as uf
from ulmfit_fast import reference
from ulmfit_fast.nn import derive_seed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SHAPES = [
    dict(),
    dict(batch_first=True),
    dict(num_layers=2, bidirectional=True),
    dict(num_layers=3, bidirectional=True, batch_first=True, bias=False),
]


def randn(*shape, dtype=torch.float64, **options):
    return torch.randn(shape, dtype=dtype, device=DEVICE, **options)


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def mask(seed, shape, p, dtype):
    return reference.dropout_mask(seed, shape, p, dtype=dtype, device=DEVICE)


def pair(dtype=torch.float64, weight_p=0.0, **options):
    """nn.LSTM(5, 7) and ours with its weights."""
    torch.manual_seed(1)
    theirs = nn.LSTM(5, 7, dtype=dtype, device=DEVICE, **options)
    ours = uf.WeightDropLSTM(5, 7, dtype=dtype, device=DEVICE, weight_p=weight_p, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def hidden(module, batch, dtype=torch.float64):
    directions = 2 if module.bidirectional else 1
    shape = (module.num_layers * directions, *batch, module.hidden_size)
    return tuple(randn(*shape, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_equals_torch_lstm_with_its_gradients(options, batch, dtype):
    theirs, ours = pair(dtype, **options)
    sizes = (*batch, 6) if options.get("batch_first") else (6, *batch)
    x = randn(*sizes, 5, dtype=dtype, requires_grad=True)
    hx = hidden(ours, batch, dtype)
    results = []
    for module in (theirs, ours):
        y, (h, c) = module(x, hx)
        weight = torch.linspace(-1, 1, y.numel(), dtype=dtype, device=DEVICE).view_as(y)
        loss = (y * weight).sum() + (h * h).sum() + c.sum()
        grads = torch.autograd.grad(loss, [x, *hx, *module.parameters()])
        results.append([y, h, c, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_called_and_warning_as_torch_lstm():
    theirs, ours = pair()
    x = randn(4, 2, 5)
    close(ours(input=x)[0], theirs(input=x)[0])
    with pytest.warns(UserWarning, match="dropout=0.5 and num_layers=1"):
        uf.WeightDropLSTM(5, 7, dropout=0.5)


def test_without_hx_starts_from_zeros():
    theirs, ours = pair(num_layers=2)
    x = randn(4, 2, 5)
    close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("lengths", [[6, 1, 4], [2, 2, 6]])
@pytest.mark.parametrize("batch_first", [True, False])
def test_lengths_equal_a_packed_sequence(batch_first, lengths):
    theirs, ours = pair(num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor(lengths)  # torch wants them on the CPU
    x = randn(*((3, 6) if batch_first else (6, 3)), 5)
    hx = hidden(ours, (3,))
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    y, state = theirs(packed, hx)
    y, _ = pad_packed_sequence(y, batch_first=batch_first)
    result, result_state = ours(x, hx, lengths=lengths.to(DEVICE))
    for a, b in zip((result, *result_state), (y, *state), strict=True):
        close(a, b)
    theirs_grads = torch.autograd.grad(y.square().sum() + state[1].sum(), list(theirs.parameters()))
    ours_grads = torch.autograd.grad(result.square().sum() + result_state[1].sum(), list(ours.parameters()))
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        close(a, b)


def test_same_seed_gives_torch_lstms_weights_and_state_dicts_go_both_ways():
    torch.manual_seed(3)
    theirs = nn.LSTM(5, 7, 2, bidirectional=True, device=DEVICE)
    torch.manual_seed(3)
    ours = uf.WeightDropLSTM(5, 7, 2, bidirectional=True, weight_p=0.5, device=DEVICE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    nn.init.zeros_(ours.weight_hh_l1_reverse)
    theirs.load_state_dict(ours.state_dict())
    assert not theirs.weight_hh_l1_reverse.any()


def test_weight_drop_is_the_documented_mask_of_each_matrix():
    theirs, ours = pair(num_layers=2, bidirectional=True, weight_p=0.4)
    x = randn(4, 3, 5)
    names = ["weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"]
    masks = [mask(derive_seed(9, i), (28, 7), 0.4, x.dtype) for i in range(4)]
    with torch.no_grad():
        for name, drop in zip(names, masks, strict=True):
            getattr(theirs, name).mul_(drop)
    y, _ = ours(x, seed=9)
    close(y, theirs(x)[0])
    y.sum().backward()
    for name, drop in zip(names, masks, strict=True):
        grad = getattr(ours, name).grad
        assert not grad[drop == 0].any() and grad[drop > 0].all()
    assert len({tuple(drop.flatten().tolist()) for drop in masks}) == 4


def test_dropout_between_layers_is_the_same_at_all_time_steps():
    _, ours = pair(num_layers=2, dropout=0.5)
    first, second = (nn.LSTM(n, 7, dtype=torch.float64, device=DEVICE) for n in (5, 7))
    state = ours.state_dict()
    first.load_state_dict({key: value for key, value in state.items() if key.endswith("l0")})
    second.load_state_dict({key.replace("l1", "l0"): state[key] for key in state if key.endswith("l1")})
    x = randn(4, 3, 5)
    dropped = first(x)[0] * mask(derive_seed(9, 2), (3, 7), 0.5, x.dtype)
    close(ours(x, seed=9)[0], second(dropped)[0])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_output_comes_dropped_as_well_where_asked(options, train):
    _, ours = pair(num_layers=2, dropout=0.5, **options)
    ours.train(train)
    x, batch_first = randn(4, 3, 5), "batch_first" in options
    expected, (h_n, _) = ours(x, seed=9)
    y, (h, _), dropped = ours(x, seed=9, dropout_p=0.3, dropout_seed=4)
    assert torch.equal(y, expected) and torch.equal(h, h_n)
    assert torch.equal(dropped, uf.variational_dropout(y, 0.3, seed=4, batch_first=batch_first))
    alone, _, dropped = ours(x[:, 0], seed=9, dropout_p=0.3)
    assert alone.shape == dropped.shape and (dropped == 0).any() and not (alone == 0).any()


def test_manual_seed_governs_training_and_eval_drops_nothing():
    theirs, ours = pair(weight_p=0.5, num_layers=2, dropout=0.5)
    x = randn(4, 3, 5)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(ours(x)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    before = random_state()
    close(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert torch.equal(before, random_state())


@pytest.mark.parametrize("steps, batch", [(0, 3), (4, 0)])
def test_no_time_and_no_batch(steps, batch):
    _, ours = pair(num_layers=2, bidirectional=True, weight_p=0.5)
    y, (h, c) = ours(torch.zeros(steps, batch, 5, dtype=torch.float64, device=DEVICE))
    assert y.shape == (steps, batch, 14) and h.shape == c.shape == (4, batch, 7)
    y.sum().backward()


@pytest.mark.parametrize("train", [True, False])
def test_copies_pickles_moves_and_casts_after_a_step(train):
    _, ours = pair(torch.float32, num_layers=2, weight_p=0.5)
    ours.train(train)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    x = randn(4, 3, 5, dtype=torch.float32)
    ours(x)[0].sum().backward()
    optimizer.step()
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours).double().float(),
    ):
        assert torch.equal(other(x, seed=1)[0], ours(x, seed=1)[0])
        assert other.training == train and all(p.is_leaf for p in other.parameters())
    assert ours.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("train", [True, False])
def test_compiles_to_one_graph(train):
    _, ours = pair(torch.float32, num_layers=2, bidirectional=True, weight_p=0.5, dropout=0.2)
    ours.train(train)
    x, lengths = randn(4, 3, 5, dtype=torch.float32), torch.tensor([4, 1, 3], device=DEVICE)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    seed = torch.tensor(7, device=DEVICE)
    y = compiled(x, lengths=lengths, seed=seed)[0]
    close(y, ours(x, lengths=lengths, seed=seed)[0], torch.float32)
    y.sum().backward()
    compiled(x)


def test_errors_name_the_argument():
    for options, error in (
        (dict(proj_size=3), ValueError),
        (dict(weight_p=1.0), ValueError),
        (dict(dropout=-0.1), ValueError),
        (dict(num_layers=0), ValueError),
        (dict(bias=1), TypeError),
        (dict(hidden_size=7.0), TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            uf.WeightDropLSTM(**(dict(input_size=5, hidden_size=7) | options))
    _, ours = pair(torch.float32)
    x = randn(4, 3, 5, dtype=torch.float32)
    with pytest.raises(TypeError, match="lengths="):
        ours(pack_padded_sequence(x, torch.tensor([4, 3, 1])))
    with pytest.raises(ValueError, match="lengths"):
        ours(x[:, 0], lengths=torch.tensor([2], device=DEVICE))
    with pytest.raises(ValueError, match="lengths"):
        ours(x, lengths=torch.tensor([2, 4], device=DEVICE))
    if DEVICE.type == "cpu":  # on CUDA an assertion of the kernel: test_cuda_runtime.py
        with pytest.raises(ValueError, match="lengths"):
            ours(x, lengths=torch.tensor([2, 5, 1]))
    with pytest.raises(TypeError, match="hx"):
        ours(x, torch.zeros(1, 3, 7, device=DEVICE))
    with pytest.raises(ValueError, match="weight_p"):
        ours.eval()(x, weight_p=1.5)
    for bidirectional in (False, True):
        lstm = uf.WeightDropLSTM(5, 7, bidirectional=bidirectional, device=DEVICE)
        with pytest.raises(ValueError, match="dropout_seed needs dropout_p, got 3 alone"):
            lstm(x, dropout_seed=3)


def test_errors_are_torch_lstms():
    theirs, ours = pair(torch.float32)
    x, h = randn(4, 3, 5, dtype=torch.float32), torch.zeros(1, 3, 7, device=DEVICE)
    calls = [(x[..., :4],), (x[None],), (x.double(),), (x, (h[:, :2], h)), (x, (h, h[0])), (x[:, 0], (h, h))]
    for arguments in calls:
        with pytest.raises((ValueError, RuntimeError)) as expected:
            theirs(*arguments)
        with pytest.raises(expected.type):
            ours(*arguments)


def test_repr_shows_what_is_not_default():
    lstm = uf.WeightDropLSTM(5, 7, 2, weight_p=0.5)
    assert repr(lstm) == "WeightDropLSTM(5, 7, num_layers=2, weight_p=0.5)"
    lstm.flatten_parameters()


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 6, 2, 2, 2)])
def test_variational_dropout(shape):
    dropout = uf.VariationalDropout(0.5)
    x = torch.ones(shape, device=DEVICE)
    y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert (y == y[:, :1]).all()
    assert torch.equal(
        uf.VariationalDropout(0.5, batch_first=False)(x, seed=4).amax(1),
        dropout(x.transpose(0, 1), seed=4).amax(0),
    )
    assert dropout.eval()(x) is x


def test_embedding_dropout():
    embedding = nn.Embedding(50, 4, padding_idx=1, device=DEVICE)
    layer = uf.EmbeddingDropout(embedding, 0.4)
    ids = torch.arange(50, device=DEVICE).view(5, 10)
    y = layer(ids, seed=2)
    drop = mask(2, (50,), 0.4, torch.float32).view(5, 10, 1)
    close(y, embedding(ids) * drop, torch.float32)
    assert 0 < (drop == 0).sum() < 50
    y.sum().backward()
    assert not embedding.weight.grad[1].any()
    layer.eval()
    before = embedding.weight.detach().clone()
    assert torch.equal(layer(ids, scale=0.5), embedding(ids) * 0.5)
    assert torch.equal(embedding.weight, before)  # fastai scales the weights in place here
    assert list(layer.state_dict()) == ["emb.weight"] and copy.deepcopy(layer).emb.padding_idx == 1
    with pytest.raises(ValueError, match="embed_p"):
        uf.EmbeddingDropout(embedding, 1.5)
    with pytest.raises(ValueError, match="max_norm"):
        uf.EmbeddingDropout(nn.Embedding(3, 2, max_norm=1.0), 0.1)
