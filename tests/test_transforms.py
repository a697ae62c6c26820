"""What autograd cannot do here is refused: tangents of forward mode, and torch.func's gradients."""

import pytest
import torch
from checks import DEVICE, randn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import ulmfit_fast as uf

IDS, LENGTHS = [0, 4, 2], [3, 1]


def lstm(which):
    """The op as a function of one of its tensors."""
    shapes = [(5, 2, 4), (2, 3), (2, 3), (12, 4), (12, 3), (12,), (12,)]
    inputs = [randn(*shape) for shape in shapes]
    return lambda t: uf.lstm(*inputs[:which], t, *inputs[which + 1 :])[0], inputs[which]


def cross_entropy(which, **options):
    inputs, target = [randn(3, 4), randn(5, 4), randn(5)], torch.tensor(IDS, device=DEVICE)
    call = lambda t: uf.linear_cross_entropy(*inputs[:which], t, *inputs[which + 1 :], target, **options)  # noqa: E731
    return call, inputs[which]


CASES = {
    "variational_dropout": lambda: (lambda x: uf.variational_dropout(x, 0.5, seed=1), randn(2, 3, 4)),
    "embedding_dropout": lambda: (
        lambda w: uf.embedding_dropout(w, torch.tensor(IDS, device=DEVICE), 0.5, seed=1),
        randn(5, 4),
    ),
    "concat_pool": lambda: (
        lambda x: uf.concat_pool(x, torch.tensor(LENGTHS, device=DEVICE)),
        randn(2, 3, 4),
    ),
    **{f"lstm {i}": lambda i=i: lstm(i) for i in range(7)},
    **{f"linear_cross_entropy {i}": lambda i=i: cross_entropy(i) for i in range(3)},
    "linear_cross_entropy none": lambda: cross_entropy(1, reduction="none"),
}


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


def dual_gradient(function, x):
    """The tangent of a vector-Jacobian product, in the direction of its vector."""
    x = x.detach().requires_grad_()
    y = function(x)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
        return forward_ad.unpack_dual(dx).tangent


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", **options)


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "dual": dual,
    "dual gradient": dual_gradient,
    "compiled": lambda f, x: compiled(lambda x: torch.func.jvp(f, (x,), (x,)))(x),
}
REVERSE = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", [*FORWARD, *REVERSE])
def test_transforms_that_would_lose_a_derivative_are_refused(case, how):
    function, x = CASES[case]()
    op, what = case.split()[0], "forward-mode" if how in FORWARD else "torch.func's"
    message = f"{op}: {what} derivatives .* not implemented.* ulmfit_fast.reference.{op} has them"
    with pytest.raises(NotImplementedError, match=message):
        (FORWARD | REVERSE)[how](function, x)


@pytest.mark.parametrize("case", CASES)
def test_a_dual_level_without_tangents_changes_nothing(case):
    function, x = CASES[case]()
    x.requires_grad_()
    expected = torch.autograd.grad(function(x).sum(), x)
    with forward_ad.dual_level():
        for f in (function, compiled(function, fullgraph=True)):
            assert torch.equal(*torch.autograd.grad(f(x).sum(), x), *expected)


def test_vmap_over_every_argument():
    """Also over those whose values are checked in Python where they can be read."""
    weight, ids, lengths = randn(5, 4), torch.tensor([IDS, IDS[::-1]]), torch.tensor([LENGTHS, [0, 2]])
    ids, lengths, out = ids.to(DEVICE), lengths.to(DEVICE), randn(2, 2, 3, 4)
    looked_up = torch.vmap(lambda i: uf.embedding_dropout(weight, i, 0.5, seed=1))(ids)
    assert torch.equal(looked_up, uf.embedding_dropout(weight, ids, 0.5, seed=1))
    pooled = torch.vmap(uf.concat_pool)(out, lengths)
    assert torch.equal(
        pooled, torch.stack([uf.concat_pool(*pair) for pair in zip(out, lengths, strict=True)])
    )


@pytest.mark.parametrize("case", [case for case in CASES if " " not in case] + ["linear_cross_entropy 0"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_traces_real_tensors(case, pre_dispatch):
    """Its values are those of a graph, which no check may read."""
    function, x = CASES[case]()
    assert torch.equal(make_fx(function, pre_dispatch=pre_dispatch)(x)(x), function(x))
    ids, lengths = torch.tensor(IDS, device=DEVICE), torch.tensor(LENGTHS, device=DEVICE)
    for f, arguments in (
        (lambda w, i: uf.embedding_dropout(w, i, 0.5, seed=1), (randn(5, 4), ids)),
        (uf.concat_pool, (randn(2, 3, 4), lengths)),
        (lambda h, w, t: uf.linear_cross_entropy(h, w, None, t), (randn(3, 4), randn(5, 4), ids)),
    ):
        assert torch.equal(make_fx(f, pre_dispatch=pre_dispatch)(*arguments)(*arguments), f(*arguments))


def test_make_fx_traces_a_language_model():
    lm = uf.LanguageModel(uf.AWDLSTM(30, 6, 10, 2)).to(DEVICE).eval()
    ids = torch.tensor([IDS], device=DEVICE)

    def loss(ids):
        lm.reset()
        return lm(ids, ids)[1]

    assert torch.equal(make_fx(loss)(ids)(ids), loss(ids))
