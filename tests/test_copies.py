"""Every module: copied and pickled before and after a step of training, cast, and on the meta device."""

import copy
import io
import pickle

import pytest
import torch
from checks import DEVICE, DTYPES
from torch import nn

import ulmfit_fast as uf

V, E, H = 30, 6, 10


def encoder():
    return uf.AWDLSTM(V, E, H, 2)


MODULES = {
    "WeightDropLSTM": lambda: uf.WeightDropLSTM(E, H, 2, batch_first=True, bidirectional=True, weight_p=0.5),
    "EmbeddingDropout": lambda: uf.EmbeddingDropout(nn.Embedding(V, E), 0.5),
    "VariationalDropout": lambda: uf.VariationalDropout(0.5),
    "AWDLSTM": encoder,
    "LanguageModel": lambda: uf.LanguageModel(encoder()),
    "TextClassifier": lambda: uf.TextClassifier(encoder(), 3, bptt=4, max_len=6),
}
ON_FLOATS = ("WeightDropLSTM", "VariationalDropout")


def inputs(name, dtype=torch.float32):
    if name in ON_FLOATS:
        return (torch.randn(4, 9, E, device=DEVICE, dtype=dtype),)
    ids = torch.randint(V, (4, 9), device=DEVICE)
    return (ids, torch.tensor([9, 2, 0, 5])) if name == "TextClassifier" else (ids,)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", MODULES)
def test_copies_have_the_same_numbers_and_go_their_own_way(name, trained, how):
    torch.manual_seed(0)
    module = MODULES[name]().to(DEVICE)
    x = inputs(name)
    if trained:
        output = first(module(*x))
        if output.requires_grad:
            output.square().sum().backward()
            torch.optim.SGD(module.parameters(), 0.1).step()
    other = COPIES[how](module)
    results = []
    for m in (module, other):
        torch.manual_seed(1)
        results.append(first(m(*x)))
    assert torch.equal(*results)
    expected = first(copy.deepcopy(module.eval())(*x))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other(*x)
    assert torch.equal(first(module(*x)), expected)  # nor is the state that it carries the copy's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_casts_after_a_forward(name, dtype):
    torch.manual_seed(0)
    module = MODULES[name]().to(DEVICE)
    module(*inputs(name))
    module.to(dtype)
    output = first(module(*inputs(name, dtype)))
    assert output.dtype == dtype
    if output.requires_grad:
        output.sum().backward()
        assert {p.grad.dtype for p in module.parameters()} == {dtype}
    module.eval().float()
    assert first(module(*inputs(name))).isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_meta_device_gives_shapes(name):
    module = MODULES[name]().to(DEVICE)
    x = inputs(name)
    expected = first(module(*x))
    output = first(module.to("meta")(x[0].to("meta"), *x[1:]))
    assert output.is_meta and output.shape == expected.shape and output.dtype == expected.dtype
