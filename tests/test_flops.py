"""FlopCounterMode counts the fused products as it counts those of the references."""

import pytest
import torch
from checks import linear_cross_entropy_case, lstm_case
from torch.utils.flop_counter import FlopCounterMode

import ulmfit_fast.flops  # noqa: F401


def flops(function, inputs, frozen=()):
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    with FlopCounterMode(display=False) as forward:
        outputs = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        sum(y.sum() for y in outputs).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("frozen", [(), (0,), (3, 4, 5, 6)], ids=["", "x", "weights"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "reverse": True}], ids=str)
def test_lstm(options, frozen):
    inputs, op, ref = lstm_case(torch.float64, **options)
    assert flops(op, inputs, frozen) == flops(ref, inputs, frozen)


def test_linear_cross_entropy():
    inputs, op, ref = linear_cross_entropy_case(torch.float64)
    logits, gradients = flops(ref, inputs)
    assert flops(op, inputs) == (logits + gradients, 0)  # all of it in the forward pass
    _, of_h = flops(ref, inputs, frozen=(1, 2))
    assert flops(op, inputs, frozen=(1, 2)) == (logits + of_h, 0)
    inputs, op, _ = linear_cross_entropy_case(torch.float64, reduction="none")
    assert flops(op, inputs) == (logits, logits + gradients)
    assert flops(op, inputs, frozen=(1, 2)) == (logits, logits + of_h)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        op(*inputs)
    assert forward.get_total_flops() == logits
