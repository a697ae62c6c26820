"""reset_parameters() draws every weight, as the constructors do; modules are made where they are wanted."""

import pytest
import torch
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf

V, E, H = 30, 8, 16


def models(**options):
    torch.manual_seed(0)
    for tied in (True, False):
        yield uf.LanguageModel(uf.AWDLSTM(V, E, H, 2, **options), tie_weights=tied)
    yield uf.LanguageModel(uf.AWDLSTM(V, E, H, 2, bidir=True, **options))
    yield uf.TextClassifier(uf.AWDLSTM(V, E, H, 2, **options), 3)


def with_fastais():
    yield from models(device=DEVICE)
    fastai = pytest.importorskip("fastai.text.all")
    from ulmfit_fast.fastai import AWD_LSTM

    yield fastai.get_language_model(AWD_LSTM, V, config=None)[0].to(DEVICE)


def reset(model):
    return model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)


def check_drawn(model):
    """Each weight and bias lies in the range that its constructor draws from, and fills it."""
    for name, parameter in model.named_parameters():
        bound, values = 0.1, parameter.detach()
        if ".rnns." in name or name.startswith("rnns."):
            owner = model.get_submodule(name[: name.index("rnns.") + len("rnns.0")])
            bound = owner.module.hidden_size**-0.5
        elif ".layers." in name and values.dim() == 2:
            bound = values.size(1) ** -0.5
        elif values.dim() == 1:  # a decoder's bias; a batch norm's weight and bias
            assert {round(x, 6) for x in values.tolist()} <= {0.0, 1e-3, 1.0}, name
            continue
        assert 0.6 * bound < values.abs().max() <= bound and values.std() > 0.4 * bound, name


def test_every_weight_is_drawn_anew():
    for model in with_fastais():
        for parameter in model.parameters():
            nn.init.constant_(parameter, 7.0)
        check_drawn(reset(model))


def test_from_the_meta_device_to_fresh_weights():
    ids = torch.randint(V, (2, 5)).to(DEVICE)
    for model in models(device="meta", dtype=torch.float64):
        assert all(t.is_meta for t in model.state_dict().values())
        model = reset(model.to_empty(device=DEVICE)).eval()
        check_drawn(model)
        assert model(ids).dtype == torch.float64 and model(ids).isfinite().all()


def test_heads_are_made_where_the_encoder_is():
    ids = torch.randint(V, (2, 5)).to(DEVICE)
    for model in models(device=DEVICE, dtype=torch.float64):
        assert {t.dtype for t in model.parameters()} == {torch.float64}
        assert {t.device for t in model.state_dict().values()} == {DEVICE}
        if isinstance(model, uf.LanguageModel):
            model(ids, ids)[0].backward()
            model.reset()
            classifier = uf.TextClassifier.from_language_model(model, 2)
            assert classifier(ids).dtype == torch.float64


def test_a_seed_gives_the_weights_that_it_gave():
    torch.manual_seed(0)
    lm = uf.LanguageModel(uf.AWDLSTM(V, E, H, 1))
    torch.manual_seed(0)
    embedding = nn.Embedding(V, E)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    lstm = nn.LSTM(E, E)
    assert torch.equal(lm[0].encoder.weight, embedding.weight)
    assert torch.equal(lm[0].rnns[0].weight_hh_l0_raw, lstm.weight_hh_l0)
