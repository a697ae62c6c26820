"""accelerate(learn) and restore(learn): an existing learner keeps all it has, and its numbers."""

import re
import warnings

import pytest
import torch
from checks_fastai import (
    BOTH,
    CLAS_CONFIG,
    LM_CONFIG,
    OURS,
    SIZES,
    THEIRS,
    classifier,
    lm_learner,
    reviews,
    write_reviews,
)
from fastai.text.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    GradientAccumulation,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    Perplexity,
    accuracy,
    get_language_model,
    load_learner,
)
from fastai.text.models.core import LinearDecoder, SentenceEncoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ulmfit_fast import fastai as uf
from ulmfit_fast import fastai_swap

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")
# weight_p is not 0, with which fastai's WeightDropout takes the raw weight for the module's own, and dies
NO_DROPOUT = dict(output_p=0.0, hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=1e-13)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def lm_dls(path):
    return in_order(reviews(path, is_lm=True))


@pytest.fixture(scope="module")
def dls(path):
    return in_order(reviews(path))


def in_order(dls):
    """The same batches in every fit."""
    dls.train.shuffle = False
    return dls


@pytest.fixture
def double(monkeypatch):
    """float64 everywhere: fastai's loss, and its smoothed loss, are float32 otherwise."""

    def tensor(x, *more, **options):
        return x if isinstance(x, torch.Tensor) else torch.tensor((x, *more) if more else x, **options)

    for module in ("fastai.learner", "fastai.torch_core"):
        monkeypatch.setattr(f"{module}.tensor", tensor)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fitted(learn, epochs=1, seed=0):
    """learn after a fit, whose losses are (each batch's, validation's and metrics)."""
    torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(epochs, 1e-2)
    return torch.Tensor(torch.stack(learn.recorder.losses)), torch.tensor(list(learn.recorder.values[-1]))


def twins(make, dls, archs, **options):
    """A learner for each architecture, with the same weights."""
    learners = [make(dls, arch, **options) for arch in archs]
    for learn in learners:
        learn.model.load_state_dict(learners[0].model.state_dict())
    return learners


def close(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


@pytest.fixture
def made(monkeypatch):
    """The shapes of the logits that were made."""
    shapes, make = [], fastai_swap.Logits.make

    def watched(logits):
        if logits.made is None:
            shapes.append(tuple(logits.shape))
        return make(logits)

    monkeypatch.setattr(fastai_swap.Logits, "make", watched)
    return shapes


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_a_fit_of_the_language_model_has_fastais_numbers(lm_dls, double):
    """Without dropout: each batch's loss, validation's, perplexity."""
    config = {**LM_CONFIG, **NO_DROPOUT}
    theirs, ours = twins(lm_learner, lm_dls, [THEIRS, THEIRS], config=config, metrics=Perplexity())
    uf.accelerate(ours)
    assert isinstance(ours.model[0], OURS) and isinstance(ours.model[1], LinearDecoder)
    for mine, other in zip(fitted(ours, 2), fitted(theirs, 2), strict=True):
        close(mine, other)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)  # Adam divides by what is near zero


def test_a_fit_of_the_classifier_has_fastais_numbers(dls, double):
    config = {**CLAS_CONFIG, **NO_DROPOUT}
    options = dict(config=config, ps=[0.0], metrics=accuracy)
    theirs, ours = twins(classifier, dls, [THEIRS, THEIRS], **options)
    uf.accelerate(ours)
    assert type(ours.model[0]) is uf.SentenceEncoder and isinstance(ours.model[0].module, OURS)
    for mine, other in zip(fitted(ours, 2), fitted(theirs, 2), strict=True):
        close(mine, other)


def test_fused_loss_has_the_numbers_of_the_logits(lm_dls, double):
    """With dropout, as both draw the same masks."""
    plain, fused = twins(lm_learner, lm_dls, [OURS, OURS], metrics=[accuracy, Perplexity()])
    uf.accelerate(fused)
    for mine, other in zip(fitted(fused, 2), fitted(plain, 2), strict=True):
        close(mine, other)


def test_logits_are_never_held(lm_dls, made):
    learn = lm_learner(lm_dls, metrics=Perplexity())
    learn.model = get_language_model(OURS, 3000, LM_CONFIG)
    x, y = lm_dls.train.one_batch()
    uf.accelerate(learn)
    assert repr(learn.accelerated).endswith("decoder and loss are one op: logits are not made")
    sizes = []
    for undo in (False, True):
        if undo:
            uf.restore(learn)
        with Largest() as largest:
            learn.loss_func(learn.model.train()(x)[0], y).backward()
        sizes.append(largest.numel)
    assert sizes == [3000 * SIZES["emb_sz"], x.numel() * 3000]  # the weight's gradient; the logits
    fitted(uf.accelerate(learn))
    assert made == []


def test_metrics_that_need_logits_get_them_in_validation(lm_dls, made):
    learn = uf.accelerate(lm_learner(lm_dls, metrics=[accuracy, Perplexity()]))
    assert repr(learn.accelerated).endswith("logits are made in validation, for accuracy")
    values = fitted(learn)[1]
    assert len(made) == len(lm_dls.valid) and values.isfinite().all()


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

    uf.accelerate(learn)
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
def test_predictions_of_an_accelerated_learner(make, lm_dls, dls):
    learn = make(lm_dls if make is lm_learner else dls, THEIRS)

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


@pytest.mark.parametrize("what", ["to_fp16", "to_bf16", "lr_find", "accumulation", "smoothing", "ignore"])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_what_learners_do_works_fused(what, lm_dls, made, tmp_path):
    """The same losses as with logits, which are not made."""
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        learn = lm_learner(lm_dls, OURS, path=tmp_path)
        if what == "smoothing":
            learn.loss_func = CrossEntropyLossFlat(label_smoothing=0.1)
        elif what == "ignore":
            learn.loss_func = CrossEntropyLossFlat(ignore_index=2)
        elif what == "accumulation":
            learn.add_cb(GradientAccumulation(16))
        elif what.startswith("to_"):
            getattr(learn, what)()
        if fused:
            uf.accelerate(learn)
        if what == "lr_find":
            torch.manual_seed(0)
            with learn.no_logging():
                learn.lr_find(num_it=10, show_plot=False)
            losses.append(torch.stack(learn.recorder.losses))
        else:
            losses.append(fitted(learn)[0])
    assert made == []
    close(losses[1], losses[0], rtol=1e-4)


def test_logits_under_cpu_autocast(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, OURS))
    x, y = lm_dls.valid.one_batch()
    learn.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = learn.model(x)[0]
        assert logits.dtype == torch.float32 and logits.shape == (*x.shape, len(lm_dls.vocab))
        loss = learn.loss_func(logits, y)
    assert logits.made is None
    torch.testing.assert_close(torch.Tensor(CrossEntropyLossFlat()(logits, y)), loss, rtol=1e-2, atol=0)
    assert logits.made is not None  # outside of autocast, from what was computed inside


def test_a_hooked_decoder_keeps_its_logits(lm_dls, made):
    learn, seen = uf.accelerate(lm_learner(lm_dls)), []
    handle = learn.model[1].decoder.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = lm_dls.valid.one_batch()[0]
    assert type(learn.model(x)[0]) is not fastai_swap.Logits and len(seen) == 1
    handle.remove()
    assert type(learn.model(x)[0]) is fastai_swap.Logits and len(seen) == 1


@pytest.mark.parametrize(
    "loss, reason",
    [
        (LabelSmoothingCrossEntropyFlat(), "the loss is .*not fastai's CrossEntropyLossFlat"),
        (nn.CrossEntropyLoss(), "the loss is CrossEntropyLoss.*not fastai's"),
        (CrossEntropyLossFlat(weight=torch.ones(3)), "the loss has class weights"),
        (CrossEntropyLossFlat(axis=1), "the loss has axis"),
    ],
)
def test_losses_that_cannot_be_fused(loss, reason, lm_dls):
    learn = lm_learner(lm_dls, THEIRS)
    learn.loss_func = loss
    uf.accelerate(learn)
    assert re.search(f"logits are kept: {reason}", repr(learn.accelerated))
    assert isinstance(learn.model[0], OURS) and type(learn.model[1]) is LinearDecoder
    assert learn.loss_func is loss


def test_a_loss_set_afterwards_stays(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, THEIRS))
    learn.loss_func = own = CrossEntropyLossFlat(label_smoothing=0.2)
    fitted(learn)
    assert uf.restore(learn).loss_func is own


def test_learners_that_are_refused(lm_dls, dls):
    for call in (uf.accelerate, uf.restore):
        with pytest.raises(TypeError, match="learn must be a fastai Learner, got Linear"):
            call(nn.Linear(2, 2))
    plain = Learner(DataLoaders(lm_dls.train, lm_dls.valid), nn.Linear(2, 2), loss_func=nn.MSELoss())
    with pytest.raises(TypeError, match="learn must hold fastai's AWD_LSTM.*its model is a Linear without"):
        uf.accelerate(plain)
    with pytest.raises(ValueError, match="learn was not accelerated"):
        uf.restore(plain)
    learn = classifier(dls, THEIRS)
    learn.model[0].module.rnns[0].weight_p = 1.0
    with pytest.raises(ValueError, match="weight_p must be a number in"):
        uf.accelerate(learn)
    assert type(learn.model[0]) is SentenceEncoder and type(learn.model[0].module) is THEIRS
