"""Decoders and embeddings that must be called, not read: hooks, pruning, classes of other forwards."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE
from torch import nn
from torch.nn.utils import parametrizations, prune

import ulmfit_fast as uf
from ulmfit_fast.results import stream_loss

V, E = 30, 6


def language_model():
    torch.manual_seed(0)
    return uf.LanguageModel(uf.AWDLSTM(V, E, 10, 2)).to(DEVICE)


def tokens():
    return torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_class(lm):
    lm[1].decoder = Doubled(E, V).to(DEVICE)


def own_forward(lm):
    plain = copy.deepcopy(lm[1].decoder)
    lm[1].decoder.forward = lambda x: plain(x) - 1


CHANGES = {
    "pruned decoder": lambda lm: prune.l1_unstructured(lm[1].decoder, "weight", 0.5),
    "pruned embedding": lambda lm: prune.l1_unstructured(lm[0].encoder, "weight", 0.5),
    "both pruned": lambda lm: [
        prune.l1_unstructured(module, "weight", 0.5) for module in (lm[0].encoder, lm[1].decoder)
    ],
    "older weight_norm": lambda lm: nn.utils.weight_norm(lm[1].decoder),
    "parametrized": lambda lm: parametrizations.weight_norm(lm[1].decoder),
    "another class": other_class,
    "a forward of its own": own_forward,
    "a Sequential": lambda lm: setattr(lm[1], "decoder", nn.Sequential(nn.Tanh(), lm[1].decoder)),
    "a hook that changes": lambda lm: lm[1].decoder.register_forward_hook(lambda module, args, out: 3 * out),
    "a hook of the embedding": lambda lm: lm[0].encoder.register_forward_hook(lambda m, args, out: 3 * out),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older weight_norm
@pytest.mark.parametrize("change", CHANGES)
def test_the_loss_is_that_of_the_logits_in_every_step(change):
    lm, ids = language_model(), tokens()
    CHANGES[change](lm)
    targets = ids.flip(1)
    targets[0, :3] = -100
    optimizer = torch.optim.SGD(lm.parameters(), 0.1)
    for _ in range(2):  # not only the first: what a hook makes has one graph for each call
        loss, _ = lm(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm.eval().reset()
    entropy = lm(ids, targets)[1]
    lm.reset()
    torch.testing.assert_close(entropy, F.cross_entropy(lm(ids).flatten(0, 1), targets.flatten()))
    assert lm(ids, torch.full_like(ids, -100))[1] == 0


def test_the_loss_calls_the_whole_decoder():
    """So that a hook of it runs, FSDP's among them, which gathers its weights."""
    lm, ids, seen = language_model(), tokens(), []
    lm[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    lm[1].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    loss, entropy = lm.eval()(ids, ids)
    lm.reset()
    assert seen == [(4, 9, E)] and loss is entropy
    torch.testing.assert_close(
        entropy, 2 * F.cross_entropy(lm[1].decoder(lm[0](ids)).flatten(0, 1), ids.flatten())
    )


@pytest.mark.parametrize("hooked", [True, False])
def test_targets_are_as_many_as_the_rows(hooked):
    lm, h = language_model(), torch.randn(2, 3, E, device=DEVICE)
    if hooked:
        lm[1].decoder.register_forward_hook(lambda module, args, out: out)
    for shape in ((3, 2), (6,)):
        with pytest.raises(ValueError, match=r"targets must be \(2, 3\)"):
            lm[1](h, torch.zeros(shape, dtype=torch.int64, device=DEVICE))


def test_validation_calls_the_decoder():
    lm, docs = language_model(), [torch.arange(2, V).numpy()]
    lm[1].decoder.register_forward_hook(lambda module, args, out: out * 0)
    assert stream_loss(lm, docs, 2, 5) == pytest.approx(math.log(V), rel=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_embedding_that_is_called_drops_the_same_words(p):
    embedding, ids, seen = nn.Embedding(V, E, padding_idx=1, device=DEVICE), tokens(), []
    layer = uf.EmbeddingDropout(embedding, p)
    expected = layer(ids, seed=3)
    (gradient,) = torch.autograd.grad(expected.square().sum(), embedding.weight)
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.equal(layer(ids, seed=3), expected) and seen[0] is ids
    (other,) = torch.autograd.grad(layer(ids, seed=3).square().sum(), embedding.weight)
    torch.testing.assert_close(other, gradient)


@pytest.mark.cpu_only("quantised modules")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_decoder():
    lm, ids = language_model().eval(), tokens()
    expected = lm(ids, ids)[1].item()
    quantised = torch.ao.quantization.quantize_dynamic(lm, {nn.Linear})
    quantised.reset()
    assert quantised(ids, ids)[1].item() == pytest.approx(expected, rel=1e-2)
