"""accelerate(learn) and restore(learn): an existing learner keeps all it has, and its numbers."""

import copy
import warnings

import pytest
import torch
from checks_fastai import (
    BOTH,
    CLAS_CONFIG,
    LM_CONFIG,
    OURS,
    THEIRS,
    classifier,
    fitted,
    float64,
    in_order,
    lm_learner,
    quiet,
    reviews,
    twins,
    write_reviews,
)
from fastai.callback.rnn import rnn_cbs
from fastai.text.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    Perplexity,
    accuracy,
    load_learner,
)
from fastai.text.models import awdlstm
from fastai.text.models.core import LinearDecoder, SentenceEncoder
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ulmfit_fast import fastai as uf

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")
# weight_p is not 0, with which fastai's WeightDropout takes the raw weight for the module's own, and dies
NO_DROPOUT = dict(output_p=0.0, hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=1e-13)

WHOLE = 128


@pytest.fixture(scope="module")
def lm_dls(tmp_path_factory):
    return in_order(reviews(write_reviews(tmp_path_factory.mktemp("reviews")), is_lm=True))


@pytest.fixture(scope="module")
def dls(tmp_path_factory):
    return in_order(reviews(write_reviews(tmp_path_factory.mktemp("reviews"))))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Documents of one chunk of WHOLE words, which fastai reads rightly in every batch."""
    return in_order(reviews(write_reviews(tmp_path_factory.mktemp("reviews")), seq_len=WHOLE))


def close(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


@float64()
def test_a_fit_of_the_language_model_has_fastais_numbers(lm_dls):
    """Without dropout: each batch's loss, validation's, perplexity."""
    config = {**LM_CONFIG, **NO_DROPOUT}
    theirs, ours = twins(lm_learner, lm_dls, [THEIRS, THEIRS], config=config, metrics=Perplexity())
    uf.accelerate(ours)
    assert isinstance(ours.model[0], OURS) and isinstance(ours.model[1], LinearDecoder)
    for mine, other in zip(fitted(ours, 2), fitted(theirs, 2), strict=True):
        close(mine, other)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)  # Adam divides by what is near zero


@float64()
def test_a_fit_of_the_classifier_has_fastais_numbers(short):
    config = {**CLAS_CONFIG, **NO_DROPOUT}
    options = dict(config=config, ps=[0.0], metrics=accuracy, seq_len=WHOLE)
    theirs, ours = twins(classifier, short, [THEIRS, THEIRS], **options)
    uf.accelerate(ours)
    assert type(ours.model[0]) is uf.SentenceEncoder and isinstance(ours.model[0].module, OURS)
    for mine, other in zip(fitted(ours, 2), fitted(theirs, 2), strict=True):
        close(mine, other)


@BOTH
def test_everything_is_kept_there_and_back(arch, lm_dls):
    learn = lm_learner(lm_dls, arch, metrics=Perplexity())
    fitted(learn)
    old_model, old_encoder, old_loss = learn.model, learn.model[0], learn.loss_func
    parameters, groups = list(learn.model.parameters()), [list(group) for group in learn.opt.param_lists]
    steps = learn.opt.state_dict()["state"][0]["step"]
    calls = []
    handle = learn.model[0].rnns[1].register_forward_hook(lambda *args: calls.append("rnn"))
    inner = learn.model[0].rnns[0].module.register_forward_hook(lambda *args: calls.append("lstm"))
    learn.model.eval()
    x = lm_dls.valid.one_batch()[0]
    learn.model(x)  # a state to carry over
    state = [tuple(h.clone() for h in layer) for layer in learn.model[0].hidden]
    calls.clear()

    generator = torch.get_rng_state()
    uf.accelerate(learn)
    assert torch.equal(torch.get_rng_state(), generator)
    assert learn.model is old_model and isinstance(learn.model[0], OURS) and not learn.model[0].training
    assert all(a is b for a, b in zip(learn.model.parameters(), parameters, strict=True))
    assert [[id(p) for p in g] for g in learn.opt.param_lists] == [[id(p) for p in g] for g in groups]
    for mine, other in zip(learn.model[0].hidden, state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert learn.model[0].bs == x.size(0)
    learn.model(x)
    assert calls == ["lstm", "rnn"]
    handle.remove()  # the handle from before
    learn.model[0].input_dp.p = 0.125
    assert [m for m in learn.model.modules() if isinstance(m, awdlstm.AWD_LSTM)] == [learn.model[0]]
    fitted(learn)
    assert learn.opt.state_dict()["state"][0]["step"] == 2 * steps
    assert uf.accelerate(learn) is learn  # again: nothing to do

    learn.model.eval()
    learn.model.reset()
    first, second = learn.model(x)[0] + 0, learn.model(x)[0] + 0
    learn.model.reset()
    torch.testing.assert_close(learn.model(x)[0] + 0, first)
    calls.clear()
    uf.restore(learn)
    assert learn.model[0] is old_encoder and learn.loss_func is old_loss
    assert type(learn.model[1]) is LinearDecoder and learn.model[0].input_dp.p == 0.125
    assert all(a is b for a, b in zip(learn.model.parameters(), parameters, strict=True))
    torch.testing.assert_close(learn.model(x)[0], second)  # the state was carried back as well
    assert calls == ["lstm"]
    inner.remove()
    fitted(learn)
    assert learn.opt.state_dict()["state"][0]["step"] == 3 * steps


def test_a_second_learner_of_an_accelerated_model(lm_dls):
    """Its loss is fused as the first one's is, and each is restored for itself."""
    first = uf.accelerate(lm_learner(lm_dls, THEIRS))
    second = quiet(Learner(lm_dls, first.model, CrossEntropyLossFlat(), cbs=rnn_cbs()))
    assert uf.accelerate(second).accelerated.loss.startswith("decoder and loss are one op")
    for one, other in ((first, second), (second, first)):
        expected = one.validate()
        uf.restore(one)
        assert type(one.loss_func) is CrossEntropyLossFlat
        for learn in (one, other):
            close(torch.tensor(learn.validate()), torch.tensor(expected), rtol=1e-5)
        uf.accelerate(one)


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_mode_is_that_of_now(make, lm_dls, dls):
    learn = make(lm_dls if make is lm_learner else dls, THEIRS)
    for change, undo in ((learn.model.train, learn.model.eval), (learn.model.eval, learn.model.train)):
        change()
        uf.accelerate(learn)
        assert {m.training for m in learn.model.modules()} == {learn.model.training}
        undo()
        uf.restore(learn)
        assert {m.training for m in learn.model.modules()} == {learn.model.training}


def test_parameters_that_were_replaced_come_back(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, THEIRS))
    fresh = {key: torch.randn_like(value) for key, value in learn.model.state_dict().items()}
    fresh["1.decoder.weight"] = fresh["0.encoder_dp.emb.weight"] = fresh["0.encoder.weight"]
    learn.model.load_state_dict(fresh, assign=True)
    learn.model.eval()
    x = lm_dls.valid.one_batch()[0]
    learn.model.reset()
    expected = learn.model(x)[0] + 0
    uf.restore(learn)
    learn.model.reset()
    torch.testing.assert_close(learn.model(x)[0], expected)


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_predictions_of_an_accelerated_learner(make, lm_dls, short):
    learn = lm_learner(lm_dls, THEIRS) if make is lm_learner else classifier(short, THEIRS, seq_len=WHOLE)

    def everything():
        torch.manual_seed(0)
        preds, targets, losses = learn.get_preds(with_loss=True, reorder=False)
        text = learn.predict("I really liked", n_words=6, no_bar=True) if make is lm_learner else None
        return preds, losses.flatten(), text

    with learn.no_bar():
        before = everything()
        uf.accelerate(learn)
        for mine, other in zip(everything()[:2], before[:2], strict=True):
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=1e-4, atol=1e-6)
        if make is lm_learner:
            learn.show_results(max_n=1)
        else:
            assert learn.predict("I really liked that movie!")[0] in ("pos", "neg")


@pytest.mark.parametrize("accelerated", [False, True])
def test_files_of_an_accelerated_learner(lm_dls, tmp_path, accelerated):
    learn = uf.accelerate(lm_learner(lm_dls, THEIRS, path=tmp_path))
    fitted(learn)
    learn.save("lm")
    other = lm_learner(lm_dls, THEIRS, path=tmp_path)
    if accelerated:
        uf.accelerate(other)
    other.load("lm", with_opt=True)
    for mine, theirs in zip(learn.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pickles run code
        loaded = uf.restore(load_learner(tmp_path / "export.pkl"))
    assert type(loaded.model[0]) is THEIRS
    assert torch.equal(loaded.model[0].encoder.weight, learn.model[0].encoder.weight)


def test_learners_that_are_refused(lm_dls, dls):
    for call in (uf.accelerate, uf.restore):
        with pytest.raises(TypeError, match="learn must be a fastai Learner, got Linear"):
            call(nn.Linear(2, 2))
    plain = Learner(DataLoaders(lm_dls.train, lm_dls.valid), nn.Linear(2, 2), loss_func=nn.MSELoss())
    with pytest.raises(TypeError, match="learn must hold fastai's AWD_LSTM .*its model is a Linear without"):
        uf.accelerate(plain)
    with pytest.raises(ValueError, match="learn was not accelerated"):
        uf.restore(plain)
    learn = classifier(dls, THEIRS)
    learn.model[0].module.rnns[0].weight_p = 1.0
    with pytest.raises(ValueError, match="weight_p must be a number in"):
        uf.accelerate(learn)
    assert type(learn.model[0]) is SentenceEncoder and type(learn.model[0].module) is THEIRS


class Scaled(nn.Module):
    """Takes the place of a dropout, with its p."""

    p = 0.1

    def forward(self, x):
        return 3 * x


class Doubled(awdlstm.WeightDropout):
    def forward(self, *args):
        output, state = super().forward(*args)
        return 2 * output, state


def lstm(*args, **options):
    return nn.LSTM(*args, batch_first=True, **options)


CHANGES = {
    r"hidden_dps\.0 \(Scaled\).*RNNDropout itself": lambda e: setattr(e.hidden_dps, "0", Scaled()),
    r"input_dp \(Identity\).*RNNDropout itself": lambda e: setattr(e, "input_dp", nn.Identity()),
    r"encoder_dp \(Sequential\).*EmbeddingDropout itself": lambda e: setattr(
        e, "encoder_dp", nn.Sequential(e.encoder)
    ),
    r"rnns\.0 \(Doubled\).*WeightDropout itself": lambda e: setattr(e.rnns, "0", Doubled(lstm(12, 20), 0.1)),
    r"rnns\.0 \(LSTM\).*WeightDropout itself": lambda e: setattr(e.rnns, "0", lstm(12, 20)),
    r"rnns\.0 .*layer_names \['weight_hh_l0'\], not .*weight_ih": lambda e: setattr(
        e.rnns, "0", awdlstm.WeightDropout(lstm(12, 20), 0.1, ["weight_hh_l0", "weight_ih_l0"])
    ),
    r"rnns\.0\.module .*num_layers=1, not 2": lambda e: setattr(
        e.rnns, "0", awdlstm.WeightDropout(lstm(12, 20, 2), 0.1)
    ),
    r"rnns\.0\.module .*bias=True, not False": lambda e: setattr(
        e.rnns, "0", awdlstm.WeightDropout(lstm(12, 20, bias=False), 0.1)
    ),
    r"rnns\.1\.module .*parameters .*\(48, 20\).*, not .*\(48, 16\)": lambda e: setattr(
        e.rnns, "1", awdlstm.WeightDropout(lstm(16, 12), 0.1)
    ),
    r"rnns\.1\.module \(ParametrizedLSTM\).*LSTM itself": lambda e: weight_norm(
        e.rnns[1].module, "weight_ih_l0"
    ),
    r"encoder \(Embedding\).*max_norm=None, not 0.1": lambda e: setattr(e.encoder, "max_norm", 0.1),
    r"0 \(AWD_LSTM\).*own forward": lambda e: setattr(e, "forward", lambda inp: inp),
    r"extra \(Linear\).*needs nothing": lambda e: setattr(e, "extra", nn.Linear(3, 3)),
    r"hidden_dps\.1 \(NoneType\).*needs a module": lambda e: setattr(e, "hidden_dps", e.hidden_dps[:1]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_encoder_is_refused(message, lm_dls):
    """As the change would be lost; the learner stays as it is."""
    learn = lm_learner(lm_dls, THEIRS)
    CHANGES[message](learn.model[0])
    modules, loss_func = list(learn.model.modules()), learn.loss_func
    with pytest.raises(TypeError, match=rf"learn\.model\.0?\.?{message}"):
        uf.accelerate(learn)
    assert list(learn.model.modules()) == modules and learn.loss_func is loss_func
    assert "accelerated" not in vars(learn)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_encoder_is_refused(in_place, lm_dls):
    learn = lm_learner(lm_dls, THEIRS)
    if in_place:
        learn.model[0].compile(backend="eager")
    else:
        learn.model[0] = torch.compile(learn.model[0], backend="eager")
    with pytest.raises(TypeError, match=r"learn\.model\.0 is compiled.*accelerate\(learn\) first"):
        uf.accelerate(learn)


@BOTH
def test_an_accelerated_learner_can_be_copied(arch, lm_dls):
    learn = lm_learner(lm_dls, arch)
    fitted(learn)  # fastai's modules keep a dropped weight
    twin = copy.deepcopy(uf.accelerate(learn))
    uf.restore(learn)
    x = lm_dls.valid.one_batch()[0]
    for one in (learn, twin):
        one.model.eval()
        one.model.reset()
    torch.testing.assert_close(twin.model(x)[0] + 0, learn.model(x)[0])
    fitted(twin)
    assert not torch.equal(twin.model[0].encoder.weight, learn.model[0].encoder.weight)
