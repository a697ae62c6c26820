"""What CUDA asks of an op beside its numbers: streams, devices, no waiting, graphs, memory, bad input."""

import contextlib
import gc
import itertools
import os
import pathlib
import subprocess
import sys

import checks
import pytest
import test_bad_input_ops as bad
import torch
from checks import assert_near, assert_same, lstm_case, randn

import ulmfit_fast as uf

pytestmark = pytest.mark.usefixtures("cuda")

NAMES = (
    "variational_dropout",
    "embedding_dropout",
    "concat_pool",
    "lstm",
    "linear_cross_entropy",
    "linear_cross_entropy, no reduction",
)
LONG = 100_000_000  # cycles of a kernel that only waits: some 50 ms, in which a host queues any of these ops


class Problem:
    """An op and its inputs, ids, targets and lengths among them, on the device; it has run once."""

    def __init__(self, name):
        ids = torch.arange(120, device=checks.DEVICE).view(4, 30) % 40
        target, lengths = ids[0], torch.tensor([6, 0, 3, 5], device=checks.DEVICE)
        x, h0, c0, *weights = lstm_case(torch.float32, 6, 4, 20, 33, batch_first=True)[0]
        softmax = [randn(30, 24, dtype=x.dtype), randn(40, 24, dtype=x.dtype), randn(40, dtype=x.dtype)]

        def loss(reduction):
            return lambda seed, *t: uf.linear_cross_entropy(*t, target, reduction=reduction)

        def lstm(seed, *t):
            drawn = {"weight_p": 0.5, "seed": seed, "dropout_p": 0.4, "dropout_seed": seed}
            return uf.lstm(*t, **drawn, batch_first=True, lengths=lengths, reverse=True)

        inputs, self.function = {
            "variational_dropout": ([x], lambda seed, x: uf.variational_dropout(x, 0.4, seed=seed)),
            "embedding_dropout": (
                [softmax[1]],
                lambda seed, w: uf.embedding_dropout(w, ids, 0.4, seed=seed, padding_idx=1),
            ),
            "concat_pool": ([x], lambda seed, x: uf.concat_pool(x, lengths)),
            "lstm": ([x, h0, c0, *weights], lstm),
            "linear_cross_entropy": (softmax, loss("mean")),
            "linear_cross_entropy, no reduction": (softmax, loss("none")),
        }[name]
        self.leaves = [t.requires_grad_() for t in inputs]
        shapes = [y.shape for y in self.outputs(7)]
        self.upstream = [randn(*shape, dtype=x.dtype, seed=i) for i, shape in enumerate(shapes)]
        self.run(7)  # what libraries set up at a first call is there from now on

    def outputs(self, seed):
        outputs = self.function(seed, *self.leaves)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def gradients(self, outputs):
        return torch.autograd.grad(outputs, self.leaves, self.upstream)

    def run(self, seed):
        """Outputs and gradients, of work that needs nothing from the host."""
        outputs = self.outputs(seed)
        return [*(y.detach() for y in outputs), *self.gradients(outputs)]


def device_seed(value=0):
    return torch.tensor(value, dtype=torch.int64, device=checks.DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_work_follows_the_current_stream(name):
    """Inputs are zeros until a long kernel before them on the stream has ended: work beside it is wrong."""
    problem, seed = Problem(name), device_seed()
    expected = problem.run(7)
    late = [t.detach() for t in (*problem.leaves, *problem.upstream)]
    right = [t.clone() for t in late]
    inputs = len(problem.leaves)
    for t in late:
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        seed.fill_(7)
        for t, value in zip(late[:inputs], right[:inputs], strict=True):
            t.copy_(value)
        outputs = problem.outputs(seed)
        torch.cuda._sleep(LONG)
        for t, value in zip(late[inputs:], right[inputs:], strict=True):
            t.copy_(value)
        results = [*outputs, *problem.gradients(outputs)]
    stream.synchronize()
    assert_same([t.detach() for t in results], expected)


def test_a_mask_follows_the_current_stream(cuda):
    seed, expected = device_seed(), uf.dropout_mask(7, (5000,), 0.5, device=cuda)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        seed.fill_(7)
        mask = uf.dropout_mask(seed, (5000,), 0.5)
    stream.synchronize()
    assert torch.equal(mask, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_the_current_one(name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        with torch.cuda.device(0), checks.on(device):
            results.append(Problem(name).run(7))
            assert torch.cuda.current_device() == 0
            assert all(t.device == checks.DEVICE for t in results[-1])
    assert_same([t.cuda(0) for t in results[1]], results[0])


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("name", NAMES)
def test_no_op_waits_for_the_device(cuda, name, seed):
    problem = Problem(name)
    with waiting_is_an_error():
        problem.run(seed)
        uf.dropout_mask(seed, (100,), 0.5, device=cuda)
        with pytest.raises(RuntimeError, match="synchroniz"):  # that this is noticed at all
            problem.upstream[0].sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_the_language_model_does_not_wait(cuda, dtype):
    lm = uf.LanguageModel(uf.AWDLSTM(30, 6, 10, 3)).to(cuda)
    ids = torch.arange(40, device=cuda).view(4, 10) % 30
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)

    def step():
        with torch.autocast(cuda.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, _ = lm(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with waiting_is_an_error():
        step()


def captured(function):
    """(graph, results): the work of `function` as a graph. A wait within it fails the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_with_the_seed_and_inputs_of_the_moment(name):
    problem, seed = Problem(name), device_seed()
    graph, results = captured(lambda: problem.run(seed))
    for value in (1, -7, 2**40 + 3):
        seed.fill_(value)
        for t in problem.leaves:
            t.detach().copy_(torch.randn_like(t))
        graph.replay()
        assert_same([t.clone() for t in results], problem.run(value))


@pytest.mark.parametrize("name", ["embedding_dropout", "lstm"])
def test_replays_without_a_seed_draw_other_masks_and_manual_seed_governs(name):
    problem, of_weight = Problem(name), {"embedding_dropout": 1, "lstm": 8}[name]
    graph, results = captured(lambda: problem.run(None))

    def replay():
        graph.replay()
        return [t.clone() for t in results]

    for a, b in itertools.combinations([replay() for _ in range(3)], 2):
        assert not torch.equal(a[0], b[0]), "outputs"
        assert not torch.equal(a[of_weight], b[of_weight]), "gradients of what is dropped"
    torch.manual_seed(5)
    first = replay()
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(replay(), first, strict=True))


def test_forward_and_backward_of_one_replay_use_one_mask():
    """The mask that the gradient of w_hh shows, put into the weight by hand, gives the replay's output."""
    problem = Problem("lstm")
    graph, results = captured(lambda: problem.run(None))
    graph.replay()
    y, _, _, dropped, _, _, _, _, dw_hh, *_ = results
    by_hand = list(problem.leaves)
    by_hand[4] = by_hand[4] * (dw_hh != 0) * 2
    lengths = torch.tensor([6, 0, 3, 5], device=checks.DEVICE)
    expected, _, _ = uf.lstm(*by_hand, batch_first=True, lengths=lengths, reverse=True)
    assert 0.4 < (dw_hh == 0).double().mean() < 0.6
    assert_near(y, expected.detach(), torch.float32, 32)
    assert_near(dropped, y * (dropped != 0).any(1, keepdim=True) / (1 - 0.4), torch.float32, 2)


ROWS, FEATURES, WORDS = 4096, 400, 20_000


def peak(function):
    """Bytes on the device, beyond those before, at the worst moment of `function`."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    gc.collect()
    assert torch.cuda.memory_allocated() == before, "something was kept"
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_linear_cross_entropy():
    """One 16-bit copy of the logits, the gradients and a quarter; with chunk_rows, fewer rows of logits."""
    h, weight, bias = (
        randn(*shape, dtype=torch.bfloat16, scale=0.1).requires_grad_()
        for shape in ((ROWS, FEATURES), (WORDS, FEATURES), (WORDS,))
    )
    target = torch.arange(ROWS, device=checks.DEVICE)

    def step(chunk_rows=None):
        loss = uf.linear_cross_entropy(h, weight, bias, target, chunk_rows=chunk_rows)
        torch.autograd.grad(loss, (h, weight, bias))

    step()  # leaves the workspaces of libraries behind
    step(256)
    gradients = 2 * (h.numel() + weight.numel() + bias.numel())
    assert peak(step) <= 1.25 * (2 * ROWS * WORDS + gradients)
    fewer = 2 * (ROWS - 256) * WORDS
    assert peak(lambda: step(256)) <= peak(lambda: step(ROWS)) - 0.5 * fewer  # sums take more then


# each argument that must lie where the first one does, as it is in bad's good call, but on the CPU
ELSEWHERE = [
    (bad.lstm, "h0", torch.ones(3, 2)),
    (bad.lstm, "c0", torch.ones(3, 2)),
    (bad.lstm, "w_ih", torch.ones(8, 4)),
    (bad.lstm, "w_hh", torch.ones(8, 2)),
    (bad.lstm, "b_ih", torch.ones(8)),
    (bad.lstm, "b_hh", torch.ones(8)),
    (bad.lstm, "lengths", torch.tensor([5, 0, 2])),
    (bad.embedding_dropout, "ids", torch.tensor([0, 4])),
    (bad.linear_cross_entropy, "weight", torch.ones(5, 4)),
    (bad.linear_cross_entropy, "bias", torch.ones(5)),
    (bad.linear_cross_entropy, "target", torch.tensor([0, 4, -100])),
    (bad.concat_pool, "lengths", torch.tensor([3, 0])),
]


@pytest.mark.parametrize("op, name, value", ELSEWHERE, ids=lambda value: getattr(value, "__name__", None))
def test_an_argument_on_another_device_is_named(cuda, op, name, value):
    op(**{name: value.to(cuda)})
    message = f"^{op.__name__}: {name} is on cpu, but the other tensors are on {cuda}"
    with pytest.raises(ValueError, match=message):
        op(**{name: value})


def test_a_first_argument_on_another_device_is_refused_and_a_seed_is_moved(cuda):
    with pytest.raises(ValueError, match=f"^lstm: w_hh is on {cuda}, but the other tensors are on cpu"):
        bad.lstm(x=torch.ones(5, 3, 4))
    mask = uf.dropout_mask(torch.tensor(5), (100,), 0.5, device=cuda)
    assert torch.equal(mask, uf.dropout_mask(5, (100,), 0.5, device=cuda))
    with pytest.raises(RuntimeError, match="concat_pool: lengths must be on the same device"):
        torch.ops.ulmfit_fast.concat_pool(torch.ones(2, 3, 4, device=cuda), torch.tensor([3, 0]))


OUT_OF_RANGE = """
import sys, checks, torch
checks.DEVICE = torch.device(sys.argv[1])
import test_bad_input_ops as bad
op, changes, _, _ = bad.VALUES[int(sys.argv[2])]
op()
torch.cuda.synchronize(checks.DEVICE)
print("the good call passes", flush=True)
try:
    op(**{name: checks.here(value) for name, value in changes.items()})
    torch.cuda.synchronize(checks.DEVICE)
except RuntimeError:  # shown without its traceback, so that what stands in stderr is the assertion's
    sys.exit(3)
"""


def test_values_out_of_range_end_the_process_with_a_sentence(cuda):
    """An assertion on the device, as torch's own embedding has: nobody waits to read ids on the host.

    It leaves a process without its GPU, so each runs in one of its own, and all at once: each takes seconds.
    """
    paths = [str(pathlib.Path(__file__).parent), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OUT_OF_RANGE, str(cuda), str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(len(bad.VALUES))
    ]
    said = [process.communicate(timeout=300) for process in processes]
    for (op, changes, _, _), process, (out, err) in zip(bad.VALUES, processes, said, strict=True):
        assert out == "the good call passes\n", err
        assert process.returncode != 0, f"{op.__name__} took {changes}"
        assert f"ulmfit_fast.{op.__name__}" in err
