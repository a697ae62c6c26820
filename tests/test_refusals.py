"""What files and models cannot be saved or converted, in words; and inputs of no rows or one."""

import numpy as np
import pytest
import torch
from checks import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, prune

import ulmfit_fast as uf
from ulmfit_fast.checkpoints import atomic_write
from ulmfit_fast.salesforce import WeightDrop


def language_model():
    torch.manual_seed(0)
    return uf.LanguageModel(uf.AWDLSTM(30, 6, 10, 2)).to(DEVICE)


def test_save_checkpoint_names_what_it_was_given(tmp_path):
    with pytest.raises(TypeError, match="model must be .* got 3"):
        uf.save_checkpoint(tmp_path / "a.pth", 3)
    with pytest.raises(FileNotFoundError) as refused:
        uf.save_checkpoint(tmp_path / "no" / "a.pth", language_model(), format="torch")
    assert refused.value.filename == str(tmp_path / "no" / "a.pth")
    with pytest.raises(IsADirectoryError) as refused:
        atomic_write(tmp_path, "text")
    assert str(refused.value).endswith(f"Is a directory: {str(tmp_path)!r}")


@pytest.mark.parametrize("format", ["ulmfit_fast", "fastai", "torch"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (list(range(30)), TypeError, r"tokens\[0\] must be str, got int: 0"),
        ([*"a" * 29, None], TypeError, r"tokens\[29\] must be str, got NoneType"),
        ("a" * 30, TypeError, "tokens must be a list of words, got one str: 'aaa"),
        (5, TypeError, "tokens must be a list of words, got int"),
        ([*"a" * 29, "b\ud800"], ValueError, r"tokens\[29\] is not valid Unicode: .* in 'b\\ud800'"),
    ],
)
def test_tokens_are_str(tmp_path, tokens, error, message, format):
    with pytest.raises(error, match=message):
        uf.save_checkpoint(tmp_path / "a.pth", language_model(), format, tokens)
    assert not list(tmp_path.iterdir())


def test_numpys_tokens_are_saved_as_str(tmp_path):
    words = [f"w{i}" for i in range(30)]
    for format in ("ulmfit_fast", "fastai"):
        uf.save_checkpoint(tmp_path / "a.pth", language_model(), format, np.array(words))
        tokens = uf.load_checkpoint(tmp_path / "a.pth").tokens
        assert tokens == words and {type(token) for token in tokens} == {str}


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: prune.l1_unstructured(lm[1].decoder, "weight", 0.5),
        lambda lm: prune.l1_unstructured(lm[0].encoder, "weight", 0.5),
        lambda lm: parametrizations.weight_norm(lm[1].decoder),
        lambda lm: parametrizations.weight_norm(lm[0].rnns[0].module, "weight_ih_l0"),
    ],
)
def test_to_torch_wants_plain_weights(change):
    lm = language_model()
    change(lm)
    with pytest.raises(ValueError, match="remove pruning and parametrizations"):
        lm.to_torch()


def test_to_torch_names_what_stands_in():
    lm = language_model()
    lm[1].decoder = nn.Sequential(lm[1].decoder)
    with pytest.raises(ValueError, match=r"a Linear as decoder\.decoder, got a Sequential"):
        lm.to_torch()
    lm = language_model()
    lm[0].rnns[1] = nn.LSTM(10, 6)
    with pytest.raises(ValueError, match=r"a WeightDropLSTM as rnns\[1\], got a LSTM"):
        lm[0].to_torch()
    lm = language_model()
    lm[0].rnns[1].module = nn.GRU(10, 6)
    with pytest.raises(ValueError, match=r"a WeightDropLSTM as rnns\[1\]\.module, got a GRU"):
        lm[0].to_torch()


@pytest.mark.parametrize("variational", [True, False])
def test_what_salesforces_weight_drop_drops_is_said_by_it_alone(variational):
    inner = uf.WeightDropLSTM(4, 5, weight_p=0.9, device=DEVICE)
    dropped = WeightDrop(inner, ["weight_hh_l0"], 0.0, variational)
    x = torch.randn(3, 2, 4, device=DEVICE)
    assert inner.weight_p == 0 and torch.equal(dropped(x)[0], dropped.eval()(x)[0])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_the_loss_of_an_empty_window_is_zero(shape):
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    loss, entropy = language_model().train()(ids, ids)
    loss.backward()
    assert loss == entropy == 0


def test_a_batch_norm_without_statistics_refuses_one_row_as_torchs():
    from ulmfit_fast.classifier import BatchNorm1d

    norm = BatchNorm1d(4, track_running_stats=False, device=DEVICE)
    assert norm(torch.ones(2, 4, device=DEVICE)).shape == (2, 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 4, device=DEVICE))


def test_weight_drop_takes_its_names_from_a_generator():
    drop = WeightDrop(nn.LSTM(3, 4), (name for name in ["weight_hh_l0"]), 0.5).to(DEVICE)
    assert "weight_hh_l0_raw" in drop.module._parameters and "weight_hh_l0" not in drop.module._parameters
    x = torch.ones(5, 2, 3, device=DEVICE)
    assert not torch.equal(drop(x)[0], drop(x)[0])
