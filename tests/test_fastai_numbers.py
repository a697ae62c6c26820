"""With fastai's weights our numbers are fastai's: eval; and in training, with one set of masks for both.

In float64, so that the tolerances hold nothing but rounding.
"""

import contextlib

import pytest
import torch
from checks_fastai import CLAS_CONFIG, LM_CONFIG, OURS, THEIRS
from fastai.text.all import CrossEntropyLossFlat, get_language_model, get_text_classifier
from fastai.text.models import awdlstm
from torch import nn

import ulmfit_fast
from ulmfit_fast import encoder
from ulmfit_fast.nn import derive_seed

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")
V, CLASSES, BPTT = 40, 3, 7
LAYERS = LM_CONFIG["n_layers"]


def pair(make, bidir=False, **options):
    """(fastai's model, ours), with the same weights, in float64."""
    torch.manual_seed(1)
    models = [make(arch, bidir, **options).double() for arch in (THEIRS, OURS)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.reset()  # fastai's state takes on a new dtype when it is reset
    return models


def language_model(arch, bidir, **options):
    return get_language_model(arch, V, {**LM_CONFIG, "bidir": bidir, **options})


def classifier(arch, bidir, **options):
    config = {**CLAS_CONFIG, "bidir": bidir, **options}
    return get_text_classifier(arch, V, CLASSES, seq_len=BPTT, config=config, max_len=2 * BPTT)


def documents(lengths=(20, 18, 13, 6), seed=0):
    """Ids (B, T), longest first, padded as fastai's Pad_Chunk does: whole chunks before, the rest behind."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.ones(len(lengths), longest, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        before = (longest - length) // BPTT * BPTT
        row[before : before + length] = torch.randint(2, V, (length,), generator=generator)
    return ids


def tokens(batch, steps=9, seed=0):
    return torch.randint(0, V, (batch, steps), generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def call_masks(model, batch, seed):
    """The masks of one call of our encoder with `seed`, in the order in which fastai's draws them."""

    def mask(seed, shape, p):
        return ulmfit_fast.dropout_mask(seed, shape, p, dtype=torch.float64)

    yield mask(derive_seed(seed, 0), (V,), model.encoder_dp.embed_p)[:, None]
    yield mask(derive_seed(seed, 1), (batch, model.emb_sz), model.input_dp.p)[:, None]
    for layer, (rnn, dropout) in enumerate(zip(model.rnns, model.hidden_dps, strict=True)):
        weight = rnn.weight_hh_l0_raw
        for direction in range(model.n_dir):
            layer_seed = derive_seed(derive_seed(seed, 2 + 2 * layer), direction)
            yield mask(layer_seed, tuple(weight.shape), rnn.weight_p)
        if layer < LAYERS - 1:
            width = weight.shape[1] * model.n_dir
            yield mask(derive_seed(seed, 3 + 2 * layer), (batch, width), dropout.p)[:, None]


@contextlib.contextmanager
def same_masks(monkeypatch, ours, batches, seed=5, other_seed=0):
    """Every call of our encoder draws `seed`, seed + 1, ..., and fastai's gets the masks that this means.

    batches: the batch size of each call. other_seed: added to the seeds of our side.
    """
    seeds = iter(range(seed + other_seed, seed + other_seed + len(batches)))
    masks = iter([m for i, batch in enumerate(batches) for m in call_masks(ours, batch, seed + i)])

    def given(x, shape, p):
        mask = next(masks)
        assert mask.shape == tuple(shape)
        return mask

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "draw_seed", lambda device: torch.tensor(next(seeds)))
        patch.setattr(awdlstm, "dropout_mask", given)
        patch.setattr(awdlstm.F, "dropout", lambda weight, p: weight * next(masks))
        yield
    assert next(masks, None) is None and next(seeds, None) is None


class FixedDropout(nn.Module):
    """One mask for each (sample, feature), the same at every call: for what both sides have in common."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        mask = ulmfit_fast.dropout_mask(3, (x.size(0), x.size(-1)), self.p, dtype=x.dtype)
        return x * (mask[:, None] if x.dim() == 3 else mask)


def reverse_dropped(theirs):
    """Has fastai's encoder drop the reverse direction as well, by its own WeightDropout's means."""
    for rnn in theirs.rnns:
        raw = nn.Parameter(rnn.module.weight_hh_l0_reverse.data)
        del rnn.module.weight_hh_l0_reverse
        rnn.register_parameter("weight_hh_l0_reverse_raw", raw)
        rnn.layer_names.append("weight_hh_l0_reverse")
    theirs.reset()


def gradients(model):
    grads = {name.replace("_raw", "").replace(".module", ""): p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads


@pytest.mark.parametrize("bidir", [False, True])
def test_language_model_in_eval(bidir):
    theirs, ours = pair(language_model, bidir)
    theirs.eval(), ours.eval()
    for batch in (5, 5, 3, 6):  # the state is carried; the batch shrinks and grows
        x = tokens(batch, seed=batch)
        for mine, other in zip(ours(x), theirs(x), strict=True):
            close(mine, other)
    for mine, other in zip(ours[0].hidden, theirs[0].hidden, strict=True):
        close(mine, tuple(other))


@pytest.mark.parametrize("bidir", [False, True])
def test_classifier_in_eval(bidir):
    theirs, ours = pair(classifier, bidir)
    theirs.eval(), ours.eval()
    for mine, other in zip(ours(documents()), theirs(documents()), strict=True):
        close(mine, other)


@pytest.mark.parametrize("bidir", [False, True])
def test_language_model_in_training(bidir, monkeypatch):
    """Three steps with the state carried, the batch shrinking: loss with AR and TAR, and every gradient."""
    theirs, ours = pair(language_model, bidir)
    for model in (theirs, ours):
        model[1].output_dp = FixedDropout(model[1].output_dp.p)
    if bidir:
        reverse_dropped(theirs[0])
    loss_func, batches = CrossEntropyLossFlat(), (5, 5, 3)
    with same_masks(monkeypatch, ours[0], batches):
        for step, batch in enumerate(batches):
            x, y = tokens(batch, seed=step), tokens(batch, seed=10 + step)
            losses = []
            for model in (theirs, ours):
                logits, raw, dropped = model(x)
                loss = loss_func(logits, y) + 2 * dropped.pow(2).mean()
                loss = loss + (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
                loss.backward()
                losses.append(loss.detach())
            close(losses[1], losses[0])
            expected = gradients(theirs)
            for name, grad in gradients(ours).items():
                close(grad, expected[name])
            for model in (theirs, ours):
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()


@pytest.mark.parametrize("bidir", [False, True])
def test_classifier_in_training(bidir, monkeypatch):
    """Two steps over documents of three chunks, of which max_len pools the last two."""
    theirs, ours = pair(classifier, bidir)
    for model in (theirs, ours):
        for block in model[1].layers:
            block[1] = FixedDropout(block[1].p)
    if bidir:
        reverse_dropped(theirs[0].module)
    chunks = [2, 3, 4]  # rows that have begun, in each chunk
    with same_masks(monkeypatch, ours[0].module, 2 * chunks):
        for step in range(2):
            losses = []
            for model in (theirs, ours):
                logits = model(documents(seed=step))[0]
                losses.append(CrossEntropyLossFlat()(logits, torch.tensor([0, 1, 2, 1])))
                losses[-1].backward()
            close(losses[1].detach(), losses[0].detach())
            expected = gradients(theirs)
            for name, grad in gradients(ours).items():
                close(grad, expected[name])
            for model in (theirs, ours):
                torch.optim.SGD(model.parameters(), lr=0.1).step()
                model.zero_grad()


def test_other_masks_give_other_numbers(monkeypatch):
    """So the tests above can fail."""
    theirs, ours = pair(language_model, output_p=0.0)
    with same_masks(monkeypatch, ours[0], [4], other_seed=1):
        assert not torch.allclose(theirs(tokens(4))[0], ours(tokens(4))[0], rtol=1e-3)
