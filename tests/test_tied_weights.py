"""Loading into models whose decoder has the embedding's weight; slices of the models."""

import pytest
import torch
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.salesforce import RNNModel

V, E = 30, 6


def language_model(tied):
    return uf.LanguageModel(uf.AWDLSTM(V, E, 10, 2), tie_weights=tied).to(DEVICE)


def salesforce(tied):
    return RNNModel("LSTM", V, E, 6, 2, tie_weights=tied).to(DEVICE)


def parts(model):
    ours = isinstance(model, uf.LanguageModel)
    return (model[1].decoder, model[0].encoder) if ours else (model.decoder, model.encoder)


LEFT_OUT = {"both": (), "encoder": ("decoder.weight",), "decoder": ("encoder.weight", "emb.weight")}


@pytest.mark.parametrize("make", [language_model, salesforce])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("given", LEFT_OUT)
def test_one_weight_wins_with_and_without_assign(make, wrapped, given):
    source = make(tied=False)
    decoder, encoder = parts(source)
    wanted = (encoder if given == "encoder" else decoder).weight
    state = {k: v for k, v in source.state_dict().items() if not k.endswith(LEFT_OUT[given])}
    for assign in (False, True):
        model = make(tied=True)
        outer = nn.ModuleDict({"lm": model}) if wrapped else model
        named = {f"lm.{key}" if wrapped else key: value for key, value in state.items()}
        outer.load_state_dict(named, strict=given == "both", assign=assign)
        decoder, encoder = parts(model)
        assert decoder.weight is encoder.weight and torch.equal(decoder.weight, wanted), assign


def test_slices_are_stock_sequentials():
    lm = language_model(True)
    classifier = uf.TextClassifier(lm[0], 2)
    for model in (lm, classifier):
        assert type(model[:1]) is nn.Sequential and list(model[:1]) == [model[0]]
        assert list(model[1:].state_dict()) == [key for key in model.state_dict() if key.startswith("1.")]
        assert model[-1] is model[1]


@pytest.mark.parametrize("make", [language_model, salesforce])
def test_an_emptied_model_is_tied_again(make):
    decoder, encoder = parts(make(tied=True).to_empty(device=DEVICE))
    assert decoder.weight is encoder.weight
