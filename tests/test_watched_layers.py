"""Layers and dropouts of the encoder that are watched, pruned or replaced: each is called as it was made."""

import pytest
import torch
from checks import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, prune

import ulmfit_fast as uf

V, E, H = 30, 6, 10


def encoder(**dropouts):
    torch.manual_seed(0)
    return uf.AWDLSTM(V, E, H, 3, **dropouts).to(DEVICE).double()


def tokens():
    return torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


WATCHED = {
    "layer": lambda e: e.rnns[0],
    "inner LSTM": lambda e: e.rnns[0].module,
    "dropout after it": lambda e: e.hidden_dps[0],
}


@pytest.mark.parametrize("which", WATCHED)
def test_hooks_see_the_values_of_stock_modules(which):
    """One tensor into a dropout, two values out of a layer, in training too; what they return counts."""
    model, ids, seen = encoder(), tokens(), []
    expected = model(ids, seed=3)
    module = WATCHED[which](model)
    handle = module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    model.reset()
    assert torch.equal(model(ids, seed=3), expected)
    ((args, out),) = seen
    if which == "dropout after it":
        (x,) = args
        assert x.shape == out.shape == (4, 9, H)
    else:
        output, (h, c) = out
        assert output.shape == (4, 9, H) and h.shape == c.shape == (1, 4, H)
    handle.remove()
    replace = (lambda out: out * 0) if which == "dropout after it" else (lambda out: (out[0] * 0, out[1]))
    module.register_forward_hook(lambda module, args, out: replace(out))
    model.reset()
    assert not torch.equal(model(ids, seed=3), expected)


MADE = {
    "pruned": lambda layer: prune.l1_unstructured(layer.module, "weight_ih_l0", 0.5),
    "pruned recurrent": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0_raw", 0.5),
    "older weight_norm": lambda layer: nn.utils.weight_norm(layer.module, "weight_ih_l0"),
    "older spectral_norm": lambda layer: nn.utils.spectral_norm(layer.module, "weight_ih_l0"),
    "parametrized": lambda layer: parametrizations.weight_norm(layer.module, "weight_ih_l0"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older weight_norm
@pytest.mark.parametrize("change", MADE)
def test_weights_that_a_hook_makes_are_those_of_this_call(change):
    model, ids = encoder(), tokens()
    layer = model.rnns[1]
    MADE[change](layer)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(2):
        model.train().reset()
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
        x, stock = torch.randn(4, 9, H, dtype=torch.float64, device=DEVICE), nn.LSTM(H, H, batch_first=True)
        output = layer.eval()(x)[0]
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            setattr(stock, name, nn.Parameter(getattr(layer.module, name).detach()))
        stock.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0_raw.detach())
        torch.testing.assert_close(output, stock(x)[0])


def test_a_pruned_layer_may_change_its_dtype():
    model = encoder().float()
    prune.l1_unstructured(model.rnns[0].module, "weight_ih_l0", 0.5)
    model(tokens())
    assert model.double()(tokens()).dtype == torch.float64


def test_dropouts_of_other_kinds():
    model, plain, ids = encoder(), encoder(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.5), tokens()
    expected = plain(ids, seed=3)
    model.encoder_dp = model.encoder
    model.input_dp = nn.Identity()
    model.hidden_dps[0], model.hidden_dps[1] = nn.Identity(), nn.Dropout(0.0)
    assert torch.equal(model(ids, seed=3), expected)
    model.set_dropout(hidden_p=0.5)
    assert model.hidden_dps[1].p == 0.5
    model.reset()
    assert not torch.equal(model(ids, seed=3), expected)


class Swapped(nn.Module):
    """A layer of someone else's: x, hx -> output, state."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, hx):
        assert all(state.is_contiguous() for state in hx), "cuDNN's LSTM takes no other"
        return self.lstm(x, hx)


def test_a_layer_of_another_kind():
    model, ids = encoder().eval(), tokens()
    expected = model(ids)
    stock = nn.LSTM(H, H, batch_first=True, device=DEVICE, dtype=torch.float64)
    layer = model.rnns[1]
    stock.load_state_dict({**layer.module.state_dict(), "weight_hh_l0": layer.weight_hh_l0_raw})
    model.rnns[1] = Swapped(stock)
    model.reset()
    torch.testing.assert_close(model(ids), expected)
    assert model.train()(ids).shape == expected.shape
    with pytest.raises(ValueError, match=r"lengths must be None where rnns\[1\] is a Swapped"):
        model(ids, lengths=torch.tensor([9, 3, 0, 1], device=DEVICE))


def test_a_layer_of_another_kind_in_both_directions_after_a_larger_batch():
    model, ids = encoder(bidir=True), tokens()
    model.rnns[1] = Swapped(nn.LSTM(H, H // 2, batch_first=True, bidirectional=True).to(ids.device).double())
    model(ids)
    assert not model.hidden[1][0][:, :2].is_contiguous(), "or this tests nothing"
    assert model(ids[:2]).shape == (2, 9, E)


def test_lstm_takes_weights_in_place_of_its_own():
    lstm, other = (uf.WeightDropLSTM(E, H).to(DEVICE).double() for _ in range(2))
    x = torch.randn(5, 3, E, dtype=torch.float64).to(DEVICE)
    torch.testing.assert_close(lstm(x, weights=dict(other.named_parameters()))[0], other(x)[0])
    with pytest.raises(TypeError, match="weights must be a dict of tensors by name, got list"):
        lstm(x, weights=lstm.all_weights)
    with pytest.raises(ValueError, match=r"weight_p must be .*got 1\.5"):
        lstm(x, weight_p=1.5)
    with pytest.raises(ValueError, match="weights must be .* weight_hh_l0, bias_ih_l0.*got 'weight_hh'"):
        lstm(x, weights={"weight_hh": other.weight_hh_l0})
