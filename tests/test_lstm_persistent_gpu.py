"""The persistent recurrence at the sizes of models, on streams, from threads, in graphs: on a GPU alone."""

import concurrent.futures

import pytest
import torch
from checks import lstm_case, with_gradients
from checks_persistent import DTYPES, VARIABLE, check_beside_general, lengths_of

pytestmark = pytest.mark.usefixtures("cuda", "persistent")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 16, 64, 100, 256])
@pytest.mark.parametrize("hidden", [33, 200, 400, 575, 768, 1024, 1150, 1152, 1500, 2048])
def test_sizes(hidden, batch, dtype, monkeypatch, tf32):
    monkeypatch.setenv(VARIABLE, "auto")  # the largest fit on no card
    options = {"lengths": lengths_of(batch, 6), "dropout_p": 0.4 if hidden > 1000 else None}
    check_beside_general(lstm_case(dtype, 6, batch, 48, hidden, **options), dtype)


@pytest.mark.parametrize(
    "time, batch, hidden", [(500, 64, 400), (500, 16, 768), (72, 64, 1152), (1, 64, 1152)]
)
def test_many_steps(time, batch, hidden):
    case = lstm_case(torch.bfloat16, time, batch, 64, hidden, dropout_p=0.4)
    check_beside_general(case, torch.bfloat16)
    inputs, op, _ = case
    first = with_gradients(op, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(op, inputs), first, strict=True))


def test_two_streams_do_not_wait_for_each_other(cuda):
    inputs, op, _ = lstm_case(torch.bfloat16, 72, 64, 64, 1152)
    leaves = [t.requires_grad_() for t in inputs]
    upstream = [torch.randn_like(y) for y in op(*leaves)]  # drawn here, or the host would keep streams apart

    def step():
        outputs = op(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    expected = step()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_two_threads_with_kernels_of_different_sizes(cuda):
    """What a kernel may take of the shared memory is one setting for all threads."""
    cases = [lstm_case(torch.bfloat16, 2, 64, 16, hidden) for hidden in (1152, 1024)]
    expected = [with_gradients(op, inputs) for inputs, op, _ in cases]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda case: [with_gradients(case[1], case[0]) for _ in range(50)], cases)
        for results, first in zip(runs, expected, strict=True):
            assert all(torch.equal(a, b) for r in results for a, b in zip(r, first, strict=True))


def test_graphs_capture_it(cuda):
    inputs, op, _ = lstm_case(torch.bfloat16, 20, 32, 40, 400)
    leaves = [t.requires_grad_() for t in inputs]
    upstream = torch.ones_like(op(*leaves)[0])

    def step():
        y = op(*leaves)[0]
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
