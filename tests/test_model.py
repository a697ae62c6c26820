"""AWDLSTM and LanguageModel: fastai's names, the carried state, the five dropouts, the loss."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, random_state
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast import reference
from ulmfit_fast.model import layer_groups
from ulmfit_fast.nn import derive_seed

V, E, H = 30, 6, 10
NO_DROPOUT = dict(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)


def encoder(**options):
    torch.manual_seed(0)
    return uf.AWDLSTM(V, E, H, 3, **options).to(DEVICE).double()


def language_model(**options):
    return uf.LanguageModel(encoder(), **options).to(DEVICE).double()


def tokens(batch=4, steps=9):
    return torch.randint(0, V, (batch, steps), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def layer_keys(layer, n_in, n_out):
    yield f"0.rnns.{layer}.weight_hh_l0_raw", (4 * n_out, n_out)
    yield f"0.rnns.{layer}.module.weight_ih_l0", (4 * n_out, n_in)
    yield f"0.rnns.{layer}.module.bias_ih_l0", (4 * n_out,)
    yield f"0.rnns.{layer}.module.bias_hh_l0", (4 * n_out,)


def test_language_model_has_fastais_keys_in_its_order():
    state = language_model().state_dict()
    expected = {"0.encoder.weight": (V, E), "0.encoder_dp.emb.weight": (V, E)}
    for layer, sizes in enumerate([(E, H), (H, H), (H, E)]):
        expected |= dict(layer_keys(layer, *sizes))
    expected |= {"1.decoder.weight": (V, E), "1.decoder.bias": (V,)}
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(expected.items())


def test_bidirectional_keys_come_after_the_forward_ones():
    keys = [key for key in encoder(bidir=True).state_dict() if key.startswith("rnns.1.")]
    names = ["weight_ih_l0", "bias_ih_l0", "bias_hh_l0"]
    names += ["weight_ih_l0_reverse", "weight_hh_l0_reverse", "bias_ih_l0_reverse", "bias_hh_l0_reverse"]
    assert keys == ["rnns.1.weight_hh_l0_raw", *(f"rnns.1.module.{name}" for name in names)]


def test_paper_size_has_fastais_number_of_parameters():
    lm = uf.LanguageModel(uf.AWDLSTM(60008))
    assert sum(p.numel() for p in lm.parameters()) == 44_336_488


@pytest.mark.parametrize("bidir", [False, True])
def test_eval_equals_stacked_torch_lstms(bidir):
    ours = encoder(bidir=bidir).eval()
    x = ours.encoder(tokens())
    for rnn in ours.rnns:
        state = {key.removeprefix("module."): value for key, value in rnn.state_dict().items()}
        state["weight_hh_l0"] = state.pop("weight_hh_l0_raw")
        sizes = x.size(2), state["weight_hh_l0"].size(1)
        lstm = nn.LSTM(*sizes, batch_first=True, bidirectional=bidir, dtype=x.dtype, device=DEVICE)
        lstm.load_state_dict(state)
        x, (h, c) = lstm(x)
    close(ours(tokens()), x)
    close(ours.hidden[-1][0], h)
    close(ours.hidden[-1][1], c)


def test_training_uses_the_documented_masks():
    ours = encoder(hidden_p=0.3, input_p=0.4, embed_p=0.2, weight_p=0.5)
    plain = copy.deepcopy(ours).eval()

    def mask(k, shape, p):
        return reference.dropout_mask(derive_seed(5, k), shape, p, dtype=torch.float64, device=DEVICE)

    x = (
        ours.encoder(tokens())
        * mask(0, (V,), 0.2)[tokens()].unsqueeze(-1)
        * mask(1, (4, E), 0.4).unsqueeze(1)
    )
    with torch.no_grad():
        for layer, rnn in enumerate(plain.rnns):
            rnn.weight_hh_l0_raw.mul_(mask(2 + 2 * layer, rnn.weight_hh_l0_raw.shape, 0.5))
            x, _ = rnn(x)
            if layer < 2:
                x = x * mask(3 + 2 * layer, (4, H), 0.3).unsqueeze(1)
    close(ours(tokens(), seed=5), x)


def test_each_dropout_alone_makes_training_random():
    for name in NO_DROPOUT:
        ours = encoder(**(NO_DROPOUT | {name: 0.5}))
        assert not torch.equal(ours(tokens(), seed=1), ours.reset() or ours(tokens(), seed=2)), name
    ours = encoder(**NO_DROPOUT)
    before = random_state()
    first = ours(tokens())
    ours.reset()
    assert torch.equal(first, ours(tokens())) and torch.equal(before, random_state())
    for part, name in ((ours.rnns[1], "weight_p"), (ours.hidden_dps[1], "p")):  # not only the first layer's
        setattr(part, name, 0.5)
        assert ours.draw_seed() is not None
        setattr(part, name, 0.0)
    assert ours.draw_seed() is None


def test_state_is_carried_detached_and_reset():
    ours = encoder().eval()
    whole = ours(tokens())
    ours.reset()
    parts = torch.cat([ours(tokens()[:, :4]), ours(tokens()[:, 4:5]), ours(tokens()[:, 5:])], 1)
    close(parts, whole)
    assert ours.bs == 4 and [h.shape[-1] for h, _ in ours.hidden] == [H, H, E]
    assert not any(t.requires_grad or t.grad_fn for pair in ours.hidden for t in pair)
    close(ours.hidden[-1][0][0], parts[:, -1])
    assert not any("hidden" in key for key in ours.state_dict())
    ours.reset()
    close(ours(tokens()), whole)


def test_batch_may_shrink_and_grow():
    ours = encoder().eval()
    ours(tokens(10))
    carried = copy.deepcopy(ours)
    whole = ours(tokens(10, 3))
    close(carried(tokens(10, 3)[:6]), whole[:6])
    assert carried.bs == 6
    grown = carried(tokens(10, 3))
    fresh = encoder().eval()
    close(grown[6:], fresh(tokens(10, 3))[6:])
    assert carried(tokens(0, 3)).shape == (0, 3, E) and carried(tokens(2, 0)).shape == (2, 0, E)


def test_from_embeds_lengths_and_raw_outputs():
    ours = encoder(bidir=True).eval()
    whole, raw = ours(tokens(), return_raw=True)
    assert raw[-1] is whole and [r.shape[-1] for r in raw] == [H, H, E]
    ours.reset()
    close(ours(ours.encoder(tokens()), from_embeds=True), whole)
    lengths = torch.tensor([9, 0, 3, 5], device=DEVICE)
    ours.reset()
    padded = ours(tokens(), lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        ours.reset()
        close(padded[b, :n], ours(tokens()[b : b + 1, :n])[0])
        assert not padded[b, n:].any()
    with pytest.raises(ValueError, match="inp"):
        ours(tokens()[0])


def test_state_follows_dtype_and_survives_copies_and_inference_mode():
    ours = encoder()
    with torch.inference_mode():
        ours(tokens())
    ours(tokens()).sum().backward()
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    expected = ours(tokens(), seed=3)
    for other in copies:
        close(other(tokens(), seed=3), expected)
    assert ours.float().hidden[0][0].dtype == torch.float32
    assert ours(tokens()).dtype == torch.float32
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert ours(tokens()).dtype == torch.bfloat16
    assert ours(tokens()).dtype == torch.float32


def test_set_dropout():
    ours = encoder()
    ours.set_dropout(hidden_p=0.1, input_p=0.2, embed_p=0.3, weight_p=0.4)
    assert {dropout.p for dropout in ours.hidden_dps} == {0.1}
    assert (ours.input_dp.p, ours.encoder_dp.embed_p) == (0.2, 0.3)
    assert {rnn.weight_p for rnn in ours.rnns} == {0.4}
    with pytest.raises(ValueError, match="weight_p"):
        ours.set_dropout(weight_p=1.25)


def test_encoder_arguments_are_checked():
    for options in (dict(n_layers=0), dict(pad_token=V), dict(emb_sz=5, bidir=True), dict(input_p=1.0)):
        with pytest.raises(ValueError, match="input_p|p must" if "input_p" in options else list(options)[0]):
            uf.AWDLSTM(**(dict(vocab_sz=V, emb_sz=E, n_hid=H) | options))


def test_loss_is_cross_entropy_plus_fastais_regularisation():
    lm = language_model(output_p=0.0)
    lm[0].set_dropout(**NO_DROPOUT)
    ids, targets = tokens(), tokens(4, 9).flip(1)
    targets[0, :3] = -100
    raw = lm[0](ids)
    entropy = F.cross_entropy(
        F.linear(raw, lm[0].encoder.weight, lm[1].decoder.bias).flatten(0, 1), targets.flatten()
    )
    regularised = (
        entropy + 3 * raw.float().square().mean() + 0.5 * (raw[:, 1:] - raw[:, :-1]).float().square().mean()
    )
    lm.reset()
    loss, alone = lm(ids, targets, alpha=3.0, beta=0.5)
    close(alone, entropy)
    close(loss, regularised)
    grads = torch.autograd.grad(loss, list(lm.parameters()))
    for a, b in zip(grads, torch.autograd.grad(regularised, list(lm.parameters())), strict=True):
        close(a, b)
    lm.eval().reset()
    loss, alone = lm(ids, targets)
    assert loss is alone
    lm.reset()
    close(F.cross_entropy(lm(ids).flatten(0, 1), targets.flatten()), alone)
    assert lm.train()(ids[:, :1], targets[:, 3:4])[0].isfinite()
    with pytest.raises(ValueError, match="targets"):
        lm(ids, targets[:, 1:])


def test_activations_are_regularised_after_the_output_dropout():
    lm = language_model(output_p=0.5)
    lm[0].set_dropout(**NO_DROPOUT)
    torch.manual_seed(7)
    loss, entropy = lm(tokens(), tokens(), alpha=2.0, beta=0.0)
    lm.reset()
    torch.manual_seed(7)
    dropped = lm[1].output_dp(lm[0](tokens()))
    close(loss - entropy, (2 * dropped.float().square().mean()).double())


@pytest.mark.parametrize("train", [True, False])
def test_weights_stay_tied(train):
    lm = language_model().train(train)
    optimizer = torch.optim.SGD(lm.parameters(), 0.1)
    lm(tokens(), tokens())[0].backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(lm.state_dict(), buffer)
    buffer.seek(0)
    loaded = language_model()
    loaded.load_state_dict(torch.load(buffer), assign=True)
    empty = language_model().to("meta").to_empty(device=DEVICE)
    empty.load_state_dict(lm.state_dict())
    lm.reset()
    for other in (
        copy.deepcopy(lm),
        pickle.loads(pickle.dumps(lm)),
        loaded,
        empty,
        copy.deepcopy(lm).float(),
    ):
        assert other[1].decoder.weight is other[0].encoder.weight is other[0].encoder_dp.emb.weight
        with torch.no_grad():
            torch.manual_seed(1)
            a = other.train(train).double()(tokens())
            torch.manual_seed(1)
            torch.testing.assert_close(a, lm(tokens()), rtol=1e-5, atol=1e-6)
        lm.reset()
    untied = language_model(tie_weights=False, bias=False)
    assert untied[1].decoder.weight is not untied[0].encoder.weight and untied[1].decoder.bias is None
    assert copy.deepcopy(untied)(tokens()).shape == (4, 9, V)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_parametrized_weight_is_tied_no_more_and_casts(part):
    lm = language_model().eval()
    module = lm[1].decoder if part == "decoder" else lm[0].encoder
    nn.utils.parametrizations.weight_norm(module)
    expected = lm(tokens())
    lm.reset()
    lm.float().double()
    torch.testing.assert_close(lm(tokens()), expected, rtol=1e-5, atol=1e-6)
    lm.load_state_dict(lm.state_dict())
    assert nn.utils.parametrize.is_parametrized(module, "weight")


def test_layer_groups_have_every_parameter_once():
    lm = language_model()
    groups = layer_groups(lm)
    assert [len(group) for group in groups] == [4, 4, 4, 2]
    assert groups[1][0] is lm[0].rnns[1].weight_hh_l0_raw and groups[3][0] is lm[0].encoder.weight
    assert {p for group in groups for p in group} == set(lm.parameters())
    with pytest.raises(TypeError, match="model"):
        layer_groups(nn.Linear(2, 2))


def test_language_model_compiles_and_carries_its_state():
    lm = language_model().float()
    compiled = torch.compile(copy.deepcopy(lm), backend="aot_eager", fullgraph=True)
    for steps in (5, 5):
        torch.manual_seed(2)
        loss = compiled(tokens(4, steps), tokens(4, steps))[0]
        torch.manual_seed(2)
        torch.testing.assert_close(loss, lm(tokens(4, steps), tokens(4, steps))[0])
    loss.backward()


def test_learns_a_cycle():
    torch.manual_seed(0)
    lm = uf.LanguageModel(uf.AWDLSTM(V, 16, 24, 2, **NO_DROPOUT), output_p=0.0).to(DEVICE)
    optimizer = torch.optim.Adam(lm.parameters(), 0.02)
    ids = (torch.arange(41, device=DEVICE) % V).expand(4, -1)
    for _ in range(120):
        lm.reset()
        loss, entropy = lm(ids[:, :-1], ids[:, 1:], alpha=0.0, beta=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert entropy < 0.5  # 3.4 before


def test_hooks_of_every_module_of_a_layer_are_called():
    """The inner LSTM is called as a module, so what looks at activations sees it."""
    model, seen = encoder(), []
    for name, module in model.rnns[1].named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, out[0].shape)))
    model(tokens(batch=4, steps=9))
    assert seen == [("module", (4, 9, H)), ("", (4, 9, H))]


def test_a_dropouts_hooks_and_stand_ins_are_called():
    """Called as fastai calls them; without them the layer's kernel drops its output itself."""
    model, seen = encoder(), []
    expected = model(tokens(), seed=5)
    model.reset()
    model.hidden_dps[0].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    close(model(tokens(), seed=5), expected)
    ((raw, dropped),) = seen
    mask = reference.dropout_mask(derive_seed(5, 3), (4, H), 0.2, dtype=torch.float64, device=DEVICE)
    close(dropped, raw * mask.unsqueeze(1))

    class Own(nn.Module):
        def forward(self, x):
            return x * mask.unsqueeze(1)

    model.hidden_dps[0] = Own()
    model.reset()
    close(model(tokens(), seed=5), expected)
