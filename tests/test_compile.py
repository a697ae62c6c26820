"""The modules under torch.compile(fullgraph=True): the eager numbers, and how many graphs new sizes cost.

aot_eager: dynamo's graphs and AOT autograd's, without waiting for a compiler; test_export.py has inductor.
"""

import copy
import types

import pytest
import torch
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.devices import to_device

V, E, H = 30, 6, 10
SIZES = [(4, 5), (4, 5), (3, 5), (6, 5), (2, 7), (7, 9)]  # batch, steps
GRAPHS = [1, 1, 2, 2, 3, 3]  # a batch that changes costs one graph with that size open, and so do steps


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def counted(module):
    import torch._dynamo.testing  # here: it takes seconds

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(module, backend=counter, fullgraph=True), counter


def tokens(batch, steps):
    return torch.randint(V, (batch, steps), device=DEVICE)


def windows(batch, steps):
    return tokens(batch, steps), tokens(batch, steps)


def documents(batch, steps):
    return tokens(batch, steps), torch.randint(steps + 1, (batch,)).to(DEVICE)


def steps_of(module, carrier, batches):
    """Outputs and gradients of one call after the other, then what `carrier` carries."""
    for seed, arguments in enumerate(batches):
        torch.manual_seed(seed)
        module.zero_grad()
        outputs = module(*arguments)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        outputs[0].square().sum().backward()
        yield [*outputs, *(p.grad for p in carrier.parameters()), *sum(getattr(carrier[0], "hidden", []), ())]


def assert_like_eager(model, batches, graphs):
    eager = copy.deepcopy(model)
    compiled, counter = counted(model)
    counts = []
    pairs = zip(steps_of(compiled, model, batches), steps_of(eager, eager, batches), strict=True)
    for results, expected in pairs:
        counts.append(counter.frame_count)
        torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-11)
    assert counts == graphs


@pytest.mark.parametrize("train", [True, False])
def test_language_model_with_its_state(train):
    torch.manual_seed(0)
    lm = uf.LanguageModel(uf.AWDLSTM(V, E, H, 1)).to(DEVICE).double().train(train)
    # one more than GRAPHS: the fresh model's state has one row
    assert_like_eager(lm, [windows(*size) for size in SIZES], [1, 2, 3, 3, 4, 4])


def classifier(max_len, **options):
    torch.manual_seed(0)
    encoder = uf.AWDLSTM(V, E, H, 1, **options)
    return uf.TextClassifier(encoder, 3, bptt=4, max_len=max_len).to(DEVICE).double()


def test_classifier_up_to_max_len_and_beyond():
    # the last two: with tokens beyond max_len, which get no gradient
    sizes = [(4, 5), (3, 5), (2, 7), (7, 9), (4, 15), (3, 23)]
    assert_like_eager(classifier(max_len=10), [documents(*size) for size in sizes], [1, 2, 3, 3, 4, 4])


@torch.no_grad()
def test_classifier_without_gradients():
    model = classifier(max_len=10).eval()
    compiled, counter = counted(model)
    for size in [(4, 5), (3, 7), (6, 15), (2, 23)]:
        ids, lengths = documents(*size)
        torch.testing.assert_close(compiled(ids, lengths), model(ids, lengths), rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 2  # max_len is nothing to it


def test_classifier_whose_lengths_lie_on_the_host():
    model = classifier(max_len=10).eval()
    compiled, _ = counted(model)
    ids, lengths = documents(4, 5)
    lengths = lengths.cpu()
    torch.testing.assert_close(compiled(ids, lengths), model(ids, lengths), rtol=1e-10, atol=1e-12)


def test_a_graph_pins_no_memory(monkeypatch):
    """torch's tracing cannot; without a GPU, a stand-in on the host that cannot either."""
    host = types.SimpleNamespace(device=torch.device("cpu"), to=lambda device: device)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert to_device(host, torch.device("cuda")) == torch.device("cuda")


def test_bidirectional_classifier_has_a_graph_for_each_width():
    sizes = [(4, 5), (3, 5), (6, 5), (6, 4)]
    model = classifier(max_len=3, bidir=True)
    assert_like_eager(model, [documents(*size) for size in sizes], [1, 2, 2, 3])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["WeightDropLSTM", "EmbeddingDropout", "VariationalDropout"])
def test_layers(name, train):
    module, draw = {
        "WeightDropLSTM": (uf.WeightDropLSTM(E, H, batch_first=True, weight_p=0.5), floats),
        "EmbeddingDropout": (uf.EmbeddingDropout(nn.Embedding(V, E), 0.5), tokens),
        "VariationalDropout": (uf.VariationalDropout(0.5), floats),
    }[name]
    module.to(DEVICE).train(train)
    compiled, counter = counted(module)
    for size, graphs in zip(SIZES, GRAPHS, strict=True):
        x = draw(*size)
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, module(x))
        assert counter.frame_count == graphs


def floats(batch, steps):
    return torch.randn(batch, steps, E, device=DEVICE)


@pytest.mark.cpu_only("on CUDA an assertion of a kernel")
@pytest.mark.parametrize("wrong", [-1, 6])
def test_a_wrong_length_in_a_graph_is_an_error(wrong):
    model, _ = counted(uf.TextClassifier(uf.AWDLSTM(V, E, H, 1), 3).eval())
    model(tokens(2, 5), torch.tensor([5, 0]))
    with pytest.raises(RuntimeError, match="lengths must be in 0..T"):
        model(tokens(2, 5), torch.tensor([5, wrong]))
