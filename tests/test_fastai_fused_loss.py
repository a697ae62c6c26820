"""The decoder and the loss of an accelerated learner as one op: its numbers, and when logits are made."""

import re

import pytest
import torch
from checks_fastai import (
    LM_CONFIG,
    OURS,
    SIZES,
    THEIRS,
    fitted,
    float64,
    in_order,
    lm_learner,
    reviews,
    twins,
    write_reviews,
)
from fastai.text.all import (
    CrossEntropyLossFlat,
    GradientAccumulation,
    LabelSmoothingCrossEntropyFlat,
    Perplexity,
    accuracy,
    get_language_model,
)
from fastai.text.models.core import LinearDecoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ulmfit_fast import fastai as uf
from ulmfit_fast import fastai_fused

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")


@pytest.fixture(scope="module")
def lm_dls(tmp_path_factory):
    return in_order(reviews(write_reviews(tmp_path_factory.mktemp("reviews")), is_lm=True))


@pytest.fixture
def made(monkeypatch):
    """The shapes of the logits that were made."""
    shapes, values = [], fastai_fused.Logits.values

    def watched(logits):
        if logits._read is None:
            shapes.append(tuple(logits.shape))
        return values(logits)

    monkeypatch.setattr(fastai_fused.Logits, "values", watched)
    return shapes


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def close(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


def of_probabilities():
    loss = CrossEntropyLossFlat()
    loss.func = nn.NLLLoss()
    return loss


@float64()
def test_fused_loss_has_the_numbers_of_the_logits(lm_dls):
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
    uf.restore(learn).recorder.train_metrics = True
    uf.accelerate(learn)
    assert repr(learn.accelerated).endswith("logits are made in training and validation, for accuracy")


@float64()
def test_metrics_of_training_are_those_before_the_step(lm_dls):
    learners = twins(lm_learner, lm_dls, [OURS, OURS], metrics=accuracy)
    uf.accelerate(learners[1])
    for learn in learners:
        learn.recorder.train_metrics = True
        fitted(learn, 2)
    plain, fused = (torch.tensor(learn.recorder.values) for learn in learners)
    assert plain.shape == (2, 4)  # losses and accuracies of training and of validation
    close(fused, plain)


def test_nan_weights_are_no_changed_ones(lm_dls):
    """So that fastai's own TerminateOnNaNCallback sees the loss."""
    learn = lm_learner(lm_dls)
    uf.accelerate(learn)
    with torch.no_grad():
        learn.model[1].decoder.bias[3] = torch.nan
    x, y = lm_dls.one_batch()
    assert learn.loss_func(learn.model(x)[0], y).isnan()


def stepped(learn):
    """A step of fastai's optimizer, which writes to p.data."""
    learn.create_opt()
    for parameter in learn.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    learn.opt.set_hyper("lr", 1e-2)
    learn.opt.step()


def loaded(learn):
    learn.model.load_state_dict({key: t + 1 for key, t in learn.model.state_dict().items()})


@pytest.mark.parametrize("change", [stepped, loaded])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_of_weights_that_are_no_more_are_an_error(change, tie_weights, lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, config={**LM_CONFIG, "tie_weights": tie_weights}))
    learn.model.eval()
    x, y = lm_dls.valid.one_batch()
    read, unread = learn.model(x)[0], learn.model(x)[0]
    before = read + 0
    change(learn)
    assert torch.equal(read + 0, before)
    for late in (lambda: unread.sum(), lambda: learn.loss_func(unread, y)):
        with pytest.raises(RuntimeError, match="the decoder's weights, .* have been changed before that"):
            late()


def test_logits_of_other_weights_for_one_call(lm_dls):
    plain, fused = twins(lm_learner, lm_dls, [OURS, OURS])
    uf.accelerate(fused)
    x = lm_dls.valid.one_batch()[0]
    twice = {name: 2 * p.detach() for name, p in plain.model.named_parameters()}
    expected, logits = (
        torch.func.functional_call(learn.model.eval(), twice, (x,))[0] for learn in (plain, fused)
    )
    assert type(logits) is fastai_fused.Logits
    torch.testing.assert_close(logits + 0, expected)


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


@pytest.mark.parametrize(
    "loss, reason",
    [
        (LabelSmoothingCrossEntropyFlat(), "the loss is .*not fastai's CrossEntropyLossFlat"),
        (nn.CrossEntropyLoss(), "the loss is CrossEntropyLoss.*not fastai's"),
        (CrossEntropyLossFlat(weight=torch.ones(3)), "the loss has class weights"),
        (of_probabilities(), "the loss computes NLLLoss"),
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


class LoRA(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward(module):
    module.forward = lambda x: (2 * x, x, x)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda d: setattr(d, "decoder", LoRA(12, 48)), "the decoder's map is a LoRA"),
        (lambda d: setattr(d, "decoder", nn.Sequential(d.decoder)), "the decoder's map is a Sequential"),
        (lambda d: with_forward(d.decoder), "the decoder's map is a Linear, or has a forward of its own"),
        (with_forward, "the decoder has a forward of its own"),
    ],
)
def test_decoders_that_cannot_be_fused(change, reason, lm_dls, made):
    learn = lm_learner(lm_dls, THEIRS)
    change(learn.model[1])
    uf.accelerate(learn)
    assert f"logits are kept: {reason}" in repr(learn.accelerated)
    assert type(learn.model[1]) is LinearDecoder and isinstance(learn.model[0], OURS)
    late = uf.accelerate(lm_learner(lm_dls, THEIRS))
    change(late.model[1])  # one that is changed afterwards
    x = lm_dls.valid.one_batch()[0]
    assert type(late.model(x)[0]) is not fastai_fused.Logits and made == []


def test_a_parametrized_decoder_is_fused(lm_dls):
    plain, fused = twins(lm_learner, lm_dls, [OURS, OURS], config={**LM_CONFIG, "tie_weights": False})
    x, y = lm_dls.valid.one_batch()
    losses, gradients = [], []
    for learn in (plain, fused):
        nn.utils.parametrizations.weight_norm(learn.model[1].decoder)
        if learn is fused:
            uf.accelerate(learn)
        torch.manual_seed(0)
        losses.append(torch.Tensor(learn.loss_func(learn.model(x)[0], y)))
        losses[-1].backward()
        gradients.append([p.grad for p in learn.model[1].parameters()])
    assert type(fused.model(x)[0]) is fastai_fused.Logits and len(gradients[0]) == 3
    close(losses[1], losses[0], rtol=1e-5)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_loss_set_afterwards_stays(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, THEIRS))
    learn.loss_func = own = CrossEntropyLossFlat(label_smoothing=0.2)
    fitted(learn)
    assert uf.restore(learn).loss_func is own


def test_a_model_in_float64_trains(lm_dls):
    """Though fastai itself is in float32, and its loss."""
    values = []
    for fuse in (False, True):
        torch.manual_seed(0)
        learn = lm_learner(lm_dls)
        learn.model.double()
        if fuse:
            uf.accelerate(learn)
        values.append(fitted(learn))
    for mine, other in zip(*values, strict=True):
        close(mine, other, rtol=1e-5)
