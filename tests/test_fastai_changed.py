"""What fastai's users change in an `AWD_LSTM`, by a subclass or in place, changed in ours."""

import pytest
import torch
from checks_fastai import LM_CONFIG, OURS, THEIRS
from fastai.text.all import TensorText, get_language_model
from fastai.text.models import awdlstm
from torch import nn

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")


def tokens():
    return torch.randint(2, 30, (4, 9), generator=torch.Generator().manual_seed(1))


def encoders(archs=(THEIRS, OURS), **config):
    torch.manual_seed(0)
    made = [get_language_model(arch, 30, {**LM_CONFIG, **config})[0] for arch in archs]
    for encoder in made:
        encoder.load_state_dict(made[0].state_dict())
        encoder.reset()
    return made


def with_hooks(base):
    class Extended(base):
        """fastai's two points of extension."""

        def _one_rnn(self, n_in, n_out, bidir, weight_p, l):  # noqa: E741
            rnn = super()._one_rnn(n_in, n_out, bidir, weight_p, l)
            rnn.layer = l
            return rnn

        def _one_hidden(self, l):  # noqa: E741
            return tuple(state + 0.1 * (l + 1) for state in super()._one_hidden(l))

    return Extended


def test_methods_that_a_subclass_overrides():
    made = [with_hooks(base)(30, 12, 20, 2).eval() for base in (THEIRS, OURS)]
    made[1].load_state_dict(made[0].state_dict())
    assert [rnn.layer for rnn in made[1].rnns] == [0, 1]
    ids = tokens()
    for encoder in made:
        encoder.reset()
    for _ in range(2):
        torch.testing.assert_close(made[1](ids), made[0](ids))
    for encoder in made:  # bs is that of the last call
        encoder.reset()
    torch.testing.assert_close(made[1](ids), made[0](ids))


def test_modules_that_are_replaced():
    """By fastai's own, and by others that it can call."""
    theirs, ours = encoders(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)
    ids = tokens()
    ours.encoder_dp = awdlstm.EmbeddingDropout(ours.encoder, 0.0)
    ours.input_dp, ours.hidden_dps[0] = nn.Identity(), awdlstm.RNNDropout(0.0)
    ours.rnns[0] = theirs.rnns[0]
    for _ in range(2):
        torch.testing.assert_close(ours(ids), theirs(ids))
    expected = theirs(ids)
    ours.hidden_dps[0] = nn.Dropout(0.5)
    assert not torch.allclose(ours(ids), expected)


def test_the_inner_lstm_alone_drops_nothing_more():
    """It has the weight that the last call dropped, as fastai's."""
    _, ours = encoders(weight_p=0.5)
    ours(tokens())
    inner, x, stock = ours.rnns[0].module, torch.randn(4, 9, 12), nn.LSTM(12, 20, batch_first=True)
    stock.load_state_dict({**inner.state_dict(), "weight_hh_l0": inner.weight_hh_l0})
    assert 0.3 < (inner.weight_hh_l0 == 0).float().mean() < 0.7
    torch.testing.assert_close(inner(x)[0], stock(x)[0])


def test_an_exported_encoder():
    _, ours = encoders()
    program = torch.export.export(ours.eval(), (tokens(),))
    ours.reset()
    torch.testing.assert_close(program.module()(tokens()), ours(tokens()))


def test_the_output_has_the_type_of_the_input():
    _, ours = encoders()
    assert type(ours(TensorText(tokens()))) is TensorText and type(ours(tokens())) is torch.Tensor
