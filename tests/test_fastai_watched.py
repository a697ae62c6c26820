"""Who watches or changes an accelerated language model gets the numbers of fastai's own decoder and loss."""

import copy

import pytest
import torch
from checks_fastai import (
    LM_CONFIG,
    OURS,
    THEIRS,
    fitted,
    float64,
    in_order,
    lm_learner,
    reviews,
    twins,
    write_reviews,
)
from fastai.callback.core import Callback
from fastai.text.all import CrossEntropyLossFlat, TensorBase, accuracy
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from ulmfit_fast import fastai as uf
from ulmfit_fast.fastai_fused import Logits, waiting

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")


@pytest.fixture(scope="module")
def lm_dls(tmp_path_factory):
    return in_order(reviews(write_reviews(tmp_path_factory.mktemp("reviews")), is_lm=True))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class OnPred(Callback):
    """Puts a function on the logits, before the loss."""

    order = 101

    def __init__(self, function):
        self.function = function

    def after_pred(self):
        self.learn.pred = self.function(self.pred)


class WithPenalty(Callback):
    """Adds a loss of its own on the logits, which a function of autograd's has read."""

    order = 101

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.loss_grad + 0.1 * Double.apply(self.pred).pow(2).mean()


def hooked(*path):
    def change(learn):
        module = learn.model
        for i in path:
            module = module[i]
        module.register_full_backward_hook(lambda module, grads, outputs: None)

    return change


WATCHERS = {
    "backward hook of the model": hooked(),
    "backward hook of the decoder": hooked(1),
    "function": lambda learn: learn.add_cb(OnPred(Double.apply)),
    "loss of one's own": lambda learn: learn.add_cb(WithPenalty()),
    "reentrant checkpoint": lambda learn: learn.add_cb(
        OnPred(lambda pred: checkpoint(torch.tanh, pred, use_reentrant=True))
    ),
    "checkpoint": lambda learn: learn.add_cb(
        OnPred(lambda pred: checkpoint(torch.tanh, pred, use_reentrant=False))
    ),
    "type": lambda learn: learn.add_cb(OnPred(TensorBase)),
    "plain": lambda learn: learn.add_cb(OnPred(lambda pred: pred.as_subclass(torch.Tensor))),
    "read without gradients": lambda learn: learn.add_cb(
        OnPred(lambda pred: (torch.no_grad()(pred.argmax)(-1), pred)[1])
    ),
    "read in inference mode": lambda learn: learn.add_cb(
        OnPred(lambda pred: (torch.inference_mode()(pred.argmax)(-1), pred)[1])
    ),
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS)
@float64()
def test_who_reads_the_logits_gets_their_gradients(watch, lm_dls):
    results = []
    for learn in twins(lm_learner, lm_dls, [OURS, OURS]):
        if results:
            uf.accelerate(learn)
        watch(learn)
        losses, values = fitted(learn)
        results.append([losses, values, *learn.model.parameters()])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert len({float(loss) for loss in results[0][0]}) > 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_linear_layer(bias, autocast):
    """By way of the graph's node, which gives them to everything that has read the logits."""
    decoder, h = nn.Linear(5, 7, bias=bias), torch.randn(2, 3, 5)
    results = []
    for call in (decoder, lambda h: waiting(decoder, h)):
        x = h.clone().requires_grad_()
        with torch.autocast("cpu", enabled=autocast):
            out = call(x)
        loss = Double.apply(out).float().pow(2).sum()
        results.append(torch.autograd.grad(loss, [x, *decoder.parameters()]))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("wanted", [True, False])
def test_waiting_makes_nothing(wanted):
    decoder, h = nn.Linear(5, 7), torch.randn(2, 3, 5)
    with torch.set_grad_enabled(wanted):
        logits = waiting(decoder, h)
    assert logits.requires_grad == wanted and logits.shape == (2, 3, 7)
    assert logits._read is None and logits.made is None


def test_second_derivatives():
    decoder, h = nn.Linear(5, 7).double(), torch.randn(2, 3, 5).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: waiting(decoder, h).tanh(), [h])
    assert torch.autograd.gradcheck(lambda h: waiting(decoder, h).tanh(), [h])


TRANSFORMS = {
    "grad": lambda decode, h: torch.func.grad(lambda h: decode(h).logsumexp(-1).sum())(h),
    "jvp": lambda decode, h: torch.func.jvp(decode, (h,), (h,))[1],
    "vmap": lambda decode, h: torch.func.vmap(decode)(h),
    "make_fx": lambda decode, h: make_fx(decode)(h)(h),
    "inference mode": lambda decode, h: torch.inference_mode()(lambda: decode(h) + 0)(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_decoder(transform, lm_dls):
    decoder, h = uf.accelerate(lm_learner(lm_dls)).model[1].eval(), torch.randn(2, 3, 12)
    result = TRANSFORMS[transform](lambda h: decoder(h)[0], h)
    torch.testing.assert_close(torch.Tensor(result), TRANSFORMS[transform](decoder.decoder, h))


def test_a_traced_model_is_that_of_its_logits(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls))
    model, (x, _) = learn.model.eval(), lm_dls.one_batch()
    x = x.as_subclass(torch.Tensor)
    model.reset()
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        model.reset()
        expected = model(x)[0].make()
    torch.testing.assert_close(traced(x)[0], torch.Tensor(expected))


def test_a_loss_that_is_changed_inside(lm_dls):
    x, y = lm_dls.one_batch()
    learn = uf.accelerate(lm_learner(lm_dls))
    own = learn.accelerated.loss_func
    weight = torch.rand(len(lm_dls.vocab))
    learn.loss_func.func = nn.CrossEntropyLoss(weight=weight)
    torch.manual_seed(0)
    logits = learn.model(x)[0]
    expected = CrossEntropyLossFlat(weight=weight)(logits.make(), y)
    torch.testing.assert_close(learn.loss_func(logits, y), expected)
    assert uf.restore(learn).loss_func is own and own.func.weight is weight


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learn: learn])
def test_metrics_of_training_in_a_copy(copied, tmp_path):
    """Each copy's own recorder says whether logits are read."""
    learn = copied(uf.accelerate(lm_learner(reviews(write_reviews(tmp_path), is_lm=True), metrics=accuracy)))
    learn.recorder.train_metrics = True
    assert all(values.isfinite().all() for values in fitted(learn))
    assert [type(cb).__name__ for cb in learn.cbs].count("ReadInTime") == 1
    uf.restore(learn)
    assert not any(type(cb).__name__ == "ReadInTime" for cb in learn.cbs)


def test_a_hooked_decoder_keeps_its_logits(lm_dls):
    learn, seen = uf.accelerate(lm_learner(lm_dls)), []
    handle = learn.model[1].decoder.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = lm_dls.valid.one_batch()[0]
    assert type(learn.model(x)[0]) is not Logits and len(seen) == 1
    handle.remove()
    assert type(learn.model(x)[0]) is Logits and len(seen) == 1


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("option", [None, "find_unused_parameters", "static_graph"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_gradients_under_ddp(option, tie_weights, lm_dls, process_group):
    """Two of DDP's options look for the decoder in the graph of what the model returns."""
    config = {**LM_CONFIG, "tie_weights": tie_weights}
    plain, fused = twins(lm_learner, lm_dls, [OURS, OURS], config=config)
    uf.accelerate(fused)
    x, y = (t.as_subclass(torch.Tensor) for t in lm_dls.train.one_batch())
    parallel = nn.parallel.DistributedDataParallel(fused.model, **({option: True} if option else {}))
    for _ in range(2):
        gradients = []
        for model, loss_func in ((plain.model, plain.loss_func), (parallel, fused.loss_func)):
            torch.manual_seed(0)
            model.zero_grad()
            logits = model(x)[0]
            loss_func(logits, y).backward()
            gradients.append([p.grad for p in model.parameters()])
        assert option or type(logits) is Logits  # with either option DDP reads what the model returns
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_logits_may_be_changed_in_place():
    decoder, h = nn.Linear(5, 7), torch.randn(2, 3, 5)
    results = []
    for call in (decoder, lambda h: waiting(decoder, h)):
        out = call(h)
        out = out.make() if isinstance(out, Logits) else out  # as the first read does
        out[..., 0] = -1e4
        out /= 2
        results.append([out, *torch.autograd.grad(out.logsumexp(-1).sum(), list(decoder.parameters()))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_changed_input_of_the_decoder_is_an_error(lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls))
    x, y = lm_dls.one_batch()
    for change in (lambda raw: raw.mul_(2), lambda raw: raw.data.mul_(2), lambda raw: raw.numpy().fill(1)):
        with torch.no_grad():
            logits, raw, _ = learn.model.eval()(x)
            change(raw)
            with pytest.raises(RuntimeError, match="or its input, have been changed"):
                logits.argmax(-1)
            with pytest.raises(RuntimeError, match="or its input, have been changed"):
                learn.loss_func(logits, y)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_has_the_gradients_that_its_logits_have(mode, lm_dls):
    """None where they were made without, and none for weights that were frozen then."""
    learn = uf.accelerate(lm_learner(lm_dls))
    (x, y), (encoder, decoder) = lm_dls.one_batch(), learn.model
    h = encoder(x)
    with mode():
        logits = decoder(h)[0]
    assert not learn.loss_func(logits, y).requires_grad
    decoder.requires_grad_(False)
    logits = decoder(h)[0]
    decoder.requires_grad_(True)
    learn.loss_func(logits, y).backward()
    assert decoder.decoder.bias.grad is None and encoder.rnns[0].weight_hh_l0_raw.grad is not None


def test_targets_as_fastais_loss_takes_them(lm_dls):
    learn, (x, y) = uf.accelerate(lm_learner(lm_dls)), lm_dls.one_batch()

    def loss(targets):
        learn.model.eval().reset()
        return learn.loss_func(learn.model(x)[0], targets)

    assert torch.equal(loss(y.flatten()), loss(y)) and loss(torch.full_like(y, -100)).isnan()
    with pytest.raises(RuntimeError, match="expected target dtype|expected scalar type"):
        loss(y.double())
    with pytest.raises(ValueError, match="to match target batch_size"):
        loss(y[:1])


CHANGED = {
    r"learn\.model\.0\.hidden_dps\.0 is a Identity now": lambda e: e.hidden_dps.__setitem__(0, nn.Identity()),
    r"learn\.model\.0\.rnns\.1\.weight_hh_l0_raw is no parameter any more": lambda e: prune.l1_unstructured(
        e.rnns[1], "weight_hh_l0_raw", 0.5
    ),
}


@pytest.mark.parametrize("message", CHANGED)
def test_restore_refuses_what_it_would_lose(message, lm_dls):
    learn = uf.accelerate(lm_learner(lm_dls, THEIRS))
    CHANGED[message](learn.model[0])
    modules = list(learn.model.modules())
    with pytest.raises(TypeError, match=message):
        uf.restore(learn)
    assert list(learn.model.modules()) == modules and "accelerated" in vars(learn)
