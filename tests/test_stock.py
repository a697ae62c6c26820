"""The stock twin that the demo and the benchmarks compare with."""

import pytest
import torch
from checks import DEVICE

import ulmfit_fast as uf
from ulmfit_fast.stock import StockLanguageModel


@pytest.mark.parametrize("weight_p", [0.0, 0.5])
def test_it_trains_evaluates_and_trains_on(weight_p):
    dropouts = dict(output_p=0.1, hidden_p=0.1, input_p=0.1, embed_p=0.1, weight_p=weight_p)
    torch.manual_seed(0)
    ours = uf.LanguageModel(uf.AWDLSTM(30, 6, 10, 2)).to(DEVICE).eval()
    twin = StockLanguageModel.like(ours, **dropouts)
    ids = torch.randint(30, (4, 9)).to(DEVICE)
    keys = list(twin.state_dict())
    torch.testing.assert_close(twin.eval()(ids, ids), ours(ids, ids))
    for train in (True, False, True):
        loss, _ = twin.train(train)(ids, ids)
        if train:  # cuDNN goes back through an LSTM in training alone
            loss.backward()
        twin.zero_grad()
    assert list(twin.state_dict()) == keys and all(p.is_leaf for p in twin.parameters())
