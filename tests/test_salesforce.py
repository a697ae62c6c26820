"""The drop-in for salesforce/awd-lstm-lm: its classes, its training script's calls, its files."""

import copy
import math
import re

import foreign_files as files
import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.salesforce import (
    LockedDropout,
    RNNModel,
    SplitCrossEntropyLoss,
    WeightDrop,
    embedded_dropout,
)

SIZES = ("LSTM", 23, 6, 10, 3)
DROPOUTS = dict(dropout=0.4, dropouth=0.3, dropouti=0.4, dropoute=0.1, wdrop=0.5)
NONE = dict(dropout=0, dropouth=0, dropouti=0, dropoute=0)


def model(tie_weights=True, **dropouts):
    return RNNModel(*SIZES, **(DROPOUTS | dropouts), tie_weights=tie_weights).to(DEVICE)


def words(*shape):
    return torch.randint(0, 23, shape, device=DEVICE)


def stock_outputs(rnn_model, ids):
    """Every layer's output by stock modules with the model's weights, from zeros, without dropout."""
    x, outputs = F.embedding(ids, rnn_model.encoder.weight), []
    for rnn in rnn_model.rnns:
        own = {key.removeprefix("module.").removesuffix("_raw"): t for key, t in rnn.named_parameters()}
        lstm = nn.LSTM(own["weight_ih_l0"].shape[1], own["weight_hh_l0"].shape[1], device=DEVICE)
        x = torch.func.functional_call(lstm, own, (x,))[0]
        outputs.append(x)
    return outputs


def test_keys():
    layer = [f"module.{name}_l0" for name in ("weight_ih", "bias_ih", "bias_hh")] + [
        "module.weight_hh_l0_raw"
    ]
    outside = ["decoder.weight", "decoder.bias"]
    expected = ["encoder.weight", *(f"rnns.{i}.{name}" for i in range(3) for name in layer), *outside]
    dropped = model()
    dropped.eval()(words(4, 2), dropped.init_hidden(2))
    assert list(dropped.state_dict()) == expected  # after an evaluation too, where theirs grow
    layer = [f"{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    expected = ["encoder.weight", *(f"rnns.{i}.{name}" for i in range(3) for name in layer), *outside]
    assert list(model(wdrop=0).state_dict()) == expected
    assert dropped.decoder.weight is dropped.encoder.weight
    assert [tuple(h.shape) for h, _ in dropped.init_hidden(5)] == [(1, 5, 10), (1, 5, 10), (1, 5, 6)]
    assert [tuple(c.shape) for _, c in model(False).init_hidden(5)] == [(1, 5, 10)] * 3


@pytest.mark.parametrize("wdrop", [0, 0.5])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_evaluation_is_that_of_stock_modules(wdrop, tie_weights):
    net, ids = model(tie_weights, wdrop=wdrop).eval(), words(7, 4)
    wanted = stock_outputs(net, ids)
    output, hidden, raw, dropped = net(ids, net.init_hidden(4), return_h=True)
    for ours, also, stock in zip(raw, dropped, wanted, strict=True):
        torch.testing.assert_close(ours, stock)
        assert ours is also
    torch.testing.assert_close(output, wanted[-1].reshape(28, -1))
    assert torch.equal(hidden[-1][0][0], raw[-1][-1])
    first, state = net(ids[:3], net.init_hidden(4))
    second, _ = net(ids[3:], tuple(tuple(h.detach() for h in layer) for layer in state))
    torch.testing.assert_close(torch.cat([first, second]), output)


def test_gradients_are_those_of_stock_modules():
    net, ids = model(wdrop=0, **NONE), words(7, 4)
    criterion = SplitCrossEntropyLoss(6, []).to(DEVICE)
    targets = words(28)
    loss = criterion(net.decoder.weight, net.decoder.bias, net(ids, net.init_hidden(4))[0], targets)
    logits = F.linear(stock_outputs(net, ids)[-1], net.decoder.weight, net.decoder.bias).flatten(0, 1)
    wanted = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, wanted)
    parameters = list(net.parameters())
    for ours, stock in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


def test_dropouts_of_training():
    net, ids = model(), words(5, 4)
    output, _, raw, dropped = net(ids, net.init_hidden(4), return_h=True)
    for before, after, p in zip(raw, dropped, (0.3, 0.3, 0.4), strict=True):
        mask = after / before
        kept = mask.isclose(torch.tensor(1 / (1 - p), device=DEVICE), rtol=1e-4)
        assert (kept | (after == 0)).all() and torch.equal(after[0] == 0, after[-1] == 0)  # one for all steps
        assert 0 < kept.float().mean() < 1
    assert torch.equal(output, dropped[-1].reshape(20, 6))
    net.dropout = net.dropouth = net.dropouti = net.dropoute = 0  # as main.py's --resume changes them
    for rnn in net.rnns:
        rnn.dropout = 0
    outputs = net(ids, net.init_hidden(4), return_h=True)[2]
    for ours, stock in zip(outputs, stock_outputs(net, ids), strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("make", [nn.LSTM, uf.WeightDropLSTM])
def test_weight_drop_of_an_lstm(make):
    lstm = make(5, 8).to(DEVICE)
    raw = lstm.weight_hh_l0
    net = WeightDrop(lstm, ["weight_hh_l0"], dropout=0.9)
    assert net.module.weight_hh_l0_raw is raw
    x = torch.randn(6, 3, 5, device=DEVICE)
    a, b = net(x)[0], net(x)[0]
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])  # the first step has no recurrence
    a.sum().backward()
    assert 0 < (raw.grad == 0).float().mean() < 1
    net.eval()
    y, (h, c) = net(x, (torch.zeros(1, 3, 8, device=DEVICE),) * 2)
    assert torch.equal(y, net(x)[0])
    net.train()(x)[0].sum().backward()  # theirs raises TypeError here


def test_weight_drop_of_one_leaves_no_recurrence():
    net = WeightDrop(nn.LSTM(5, 8, device=DEVICE), ["weight_hh_l0"], dropout=1.0)
    x = torch.randn(6, 3, 5, device=DEVICE)
    own = {name.removesuffix("_raw"): p.detach() for name, p in net.module.named_parameters()}
    own["weight_hh_l0"] = torch.zeros_like(own["weight_hh_l0"])
    wanted = torch.func.functional_call(nn.LSTM(5, 8, device=DEVICE), own, (x,))[0]
    torch.testing.assert_close(net(x)[0], wanted)


@pytest.mark.parametrize("variational", [False, True])
def test_weight_drop_of_other_weights(variational):
    linear = nn.Linear(6, 40, device=DEVICE)
    net = WeightDrop(linear, ["weight"], dropout=0.5, variational=variational)
    dropped = net(torch.eye(6, device=DEVICE)) - linear.bias
    zeros = dropped == 0
    torch.testing.assert_close(dropped[~zeros], 2 * linear.weight_raw.T[~zeros])
    assert 0 < zeros.float().mean() < 1 and (zeros.all(0) | ~zeros.any(0)).all() == variational
    x = torch.randn(4, 6, device=DEVICE)
    torch.testing.assert_close(net.eval()(x), F.linear(x, linear.weight_raw, linear.bias))
    lstm = WeightDrop(nn.LSTM(6, 4, 2, device=DEVICE), ["weight_ih_l0", "weight_hh_l1"], dropout=0.5)
    assert not torch.equal(lstm(x[:, None])[0], lstm(x[:, None])[0])
    assert torch.equal(lstm.eval()(x[:, None])[0], lstm(x[:, None])[0])
    assert set(copy.deepcopy(lstm).state_dict()) == set(lstm.state_dict())
    with pytest.raises(TypeError, match="takes no GRU"):
        WeightDrop(nn.GRU(3, 4), ["weight_hh_l0"])
    with pytest.raises(ValueError, match="rnn_type must be 'LSTM' .* got 'QRNN'"):
        RNNModel("QRNN", 5, 4, 3, 2)


def test_locked_and_embedded_dropout():
    x = torch.ones(5, 30, 4, device=DEVICE)
    locked = LockedDropout()
    y = locked(x, 0.5)
    assert set(y.unique().tolist()) == {0, 2} and torch.equal(y, y[:1].expand_as(y))
    assert locked(x, 0) is x and locked.eval()(x, 0.5) is x
    emb, ids = nn.Embedding(50, 4, device=DEVICE), torch.arange(50, device=DEVICE)
    rows = (embedded_dropout(emb, ids, 0.4) / emb.weight).detach()
    assert rows.isclose(rows[:, :1]).all() and 0 < (rows == 0).float().mean() < 1
    torch.testing.assert_close(rows.max(), torch.tensor(1 / 0.6, device=DEVICE))
    scale = torch.rand(50, 1, device=DEVICE)
    torch.testing.assert_close(embedded_dropout(emb, ids, 0, scale), emb.weight * scale)
    with pytest.raises(ValueError, match="max_norm=1"):
        embedded_dropout(nn.Embedding(3, 2, max_norm=1), torch.tensor([0]))


@pytest.mark.parametrize("splits", [[], [5], [3, 9, 17]])
def test_split_cross_entropy(splits):
    torch.set_default_dtype(torch.float64)
    try:
        weight, bias, hiddens = torch.randn(23, 6), torch.randn(23), torch.randn(23, 6)
        criterion = SplitCrossEntropyLoss(6, splits)
        for parameter in criterion.parameters():
            nn.init.normal_(parameter)
    finally:
        torch.set_default_dtype(torch.float32)
    weight, bias, hiddens, criterion = (t.to(DEVICE) for t in (weight, bias, hiddens, criterion))

    def log_p(hidden):
        if not splits:
            return F.linear(hidden, weight, bias).log_softmax(-1)
        first = torch.cat([weight[: splits[0]], criterion.tail_vectors])
        head = F.linear(hidden, first, torch.cat([bias[: splits[0]], criterion.tail_bias])).log_softmax(-1)
        result = [head[: splits[0]]]
        for i, (a, b) in enumerate(zip(splits, [*splits[1:], 23], strict=True), 1):
            result.append(head[-i] + F.linear(hidden, weight[a:b], bias[a:b]).log_softmax(-1))
        return torch.cat(result)

    each = [
        criterion(weight, bias, hiddens[:1], torch.tensor([word], device=DEVICE)).item() for word in range(23)
    ]
    torch.testing.assert_close(torch.tensor(each, dtype=torch.float64), -log_p(hiddens[0]).cpu().detach())
    assert sum(math.exp(-x) for x in each) == pytest.approx(1)
    targets = torch.randperm(23, device=DEVICE)
    wanted = -sum(log_p(h)[t] for h, t in zip(hiddens, targets, strict=True)) / 23
    torch.testing.assert_close(criterion(weight, bias, hiddens, targets), wanted)
    table = torch.stack([log_p(hidden) for hidden in hiddens])
    torch.testing.assert_close(criterion.logprob(weight, bias, hiddens), table)
    assert criterion.nsplits == len(splits) + 1
    if splits:
        torch.testing.assert_close(
            criterion.logprob(weight, bias, hiddens, [1]), table[:, slice(*criterion.splits[1:3])]
        )
    with pytest.raises(ValueError, match="splits must be increasing"):
        SplitCrossEntropyLoss(6, [5, 5])


def test_training_as_in_their_script(tmp_path):
    """Train, evaluate, train again; the switch to averaged SGD; saving, loading and going on."""
    stream = torch.randint(0, 23, (1200,)).sort()[0].view(12, 100).T.contiguous().to(DEVICE)
    net, criterion = (
        model(dropout=0.1, dropouth=0.1, dropouti=0.1, wdrop=0.1),
        SplitCrossEntropyLoss(6, [5, 9]),
    )
    criterion = criterion.to(DEVICE)
    parameters = [*net.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=2, weight_decay=1.2e-6)

    def loss_of(hidden, start, **options):
        data, targets = stream[start : start + 9], stream[start + 1 : start + 10].reshape(-1)
        output, hidden, *more = net(data, hidden, **options)
        hidden = tuple(tuple(h.detach() for h in layer) for layer in hidden)
        return criterion(net.decoder.weight, net.decoder.bias, output, targets), hidden, more

    def train():
        hidden = net.init_hidden(12)
        for start in range(0, 90, 9):
            net.train()
            optimizer.zero_grad()
            loss, hidden, (raw, dropped) = loss_of(hidden, start, return_h=True)
            loss = loss + 2 * dropped[-1].pow(2).mean() + (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.25)
            optimizer.step()

    def evaluate():
        net.eval()
        hidden, total = net.init_hidden(12), 0
        for start in range(0, 90, 9):
            loss, hidden, _ = loss_of(hidden, start)
            total += loss.data
        return total.item() / 10

    losses = [evaluate()]
    for epoch in range(5):
        train()
        losses.append(evaluate())
        if epoch == 2:
            optimizer = torch.optim.ASGD(net.parameters(), lr=2, t0=0, lambd=0.0, weight_decay=1.2e-6)
        if "t0" in optimizer.param_groups[0] and epoch > 2:
            kept = {p: p.data.clone() for p in net.parameters()}
            for p in net.parameters():
                p.data = optimizer.state[p]["ax"].clone()
            averaged = evaluate()
            torch.save([net, criterion, optimizer], tmp_path / "best.pt")
            for p in net.parameters():
                p.data = kept[p].clone()
    assert averaged < losses[0] - 0.5 and all(map(math.isfinite, losses))
    saved = {key: t.clone() for key, t in torch.load(tmp_path / "best.pt")[0].state_dict().items()}
    net, criterion, optimizer = torch.load(tmp_path / "best.pt")  # weights_only, torch's default
    assert evaluate() == pytest.approx(averaged, rel=1e-6)
    parameters = [*net.parameters(), *criterion.parameters()]
    train()
    found = uf.load_checkpoint(tmp_path / "best.pt")
    assert found.format == "salesforce" and all(
        torch.equal(saved[key].cpu(), tensor) for key, tensor in found.parts.named("salesforce").items()
    )


class TheirWeightDrop(nn.Module):
    """Of their weight_drop.py, which main.py imports to resume."""


def test_resuming_as_in_their_script(tmp_path):
    net = model()
    torch.save(
        [net, SplitCrossEntropyLoss(6, []), torch.optim.SGD(net.parameters(), lr=2)], tmp_path / "m.pt"
    )
    net = torch.load(tmp_path / "m.pt")[0]
    for rnn in net.rnns:
        if type(rnn) == TheirWeightDrop:  # noqa: E721
            rnn.dropout = 0.25
        elif rnn.zoneout > 0:
            rnn.zoneout = 0.25
    assert [rnn.dropout for rnn in net.rnns] == [rnn.zoneout for rnn in net.rnns] == [0.25] * 3
    outputs = net(words(5, 4), net.init_hidden(4))[0]
    assert outputs.isfinite().all() and net.rnns[0].dropout == 0.25


def test_from_checkpoint(tmp_path, monkeypatch):
    ids = torch.randint(0, 7, (5, 2))
    theirs, data = files.salesforce_pickle(monkeypatch, zipped=True)
    (tmp_path / "PTB.pt").write_bytes(data)
    for wdrop in (0, 0.5):
        net = RNNModel.from_checkpoint(tmp_path / "PTB.pt", wdrop=wdrop).eval()
        assert net.tie_weights and net.dropoute == 0.1
        output, _ = net(ids, net.init_hidden(2))
        lm = uf.load_checkpoint(tmp_path / "PTB.pt").language_model().eval()
        torch.testing.assert_close(net.decoder(output).view(5, 2, -1), lm(ids.T).transpose(0, 1))
    split = SplitCrossEntropyLoss(6, [5, 9])
    torch.save([model(), split, torch.optim.SGD(split.parameters(), lr=1)], tmp_path / "split.pt")
    note = r"left out: the criterion's tail_vectors \(2, 6\), tail_bias \(2,\); .*softmax in two stages"
    assert re.match(note, " ".join(uf.load_checkpoint(tmp_path / "split.pt").notes))
    assert uf.load_checkpoint(tmp_path / "PTB.pt").notes == ()
    untied = RNNModel(*SIZES, wdrop=0.5)
    torch.save(untied.state_dict(), tmp_path / "untied.pt")
    again = RNNModel.from_checkpoint(tmp_path / "untied.pt", wdrop=0.5)
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in untied.state_dict().items())
    torch.save(uf.AWDLSTM(7, 4, 5, 2).state_dict(), tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="encoder.pt is no language model"):
        RNNModel.from_checkpoint(tmp_path / "encoder.pt")
