"""How an op is compared with its fp64 reference, and the cases that more than one test file uses.

A case is (inputs, op, reference): float tensors; the op as a function of them; and the reference as a
function of the same numbers in fp64.  Tolerances are `factor` machine epsilons of the dtype, relative to the
largest value expected, and `factor` is a small number that a test states with its reason.

Everything made here lies on DEVICE, as do the tests' own tensors; a reference runs on its inputs' device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ulmfit_fast import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cpu")  # `pytest --device` sets it before the test files are imported (conftest.py)
CUDA_KERNELS = False  # set with it: the CUDA kernels run, on a GPU or in the build of `make cuda-on-cpu`
Case = tuple[list[Tensor], Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def mask64(seed: int, shape: tuple[int, ...], p: float) -> Tensor:
    return reference.dropout_mask(seed, shape, p, dtype=torch.float64, device=DEVICE)


def here(value: object) -> object:
    """A CPU tensor moved to DEVICE; anything else as it is. For arguments made before DEVICE was known."""
    return value.to(DEVICE) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@contextlib.contextmanager
def on(device: torch.device | str) -> Iterator[None]:
    """DEVICE is `device` inside."""
    global DEVICE
    before, DEVICE = DEVICE, torch.device(device)
    try:
        yield
    finally:
        DEVICE = before


def random_state() -> Tensor:
    """The state of the default generators that DEVICE's ops could draw from."""
    states = [torch.get_rng_state()]
    if DEVICE.type == "cuda":
        states.append(torch.cuda.get_rng_state(DEVICE))
    return torch.cat(states)


def with_gradients(
    function: Callable, inputs: list[Tensor], like: list[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then the gradient of each input for fixed random upstream gradients.

    The upstream gradients are rounded to the dtypes of `like` (default: the outputs), so that an op and its
    fp64 reference are given the same numbers.
    """
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    upstream = [
        randn(*y.shape, dtype=(y if like is None else like[i]).dtype, seed=17 + i).to(y)
        for i, y in enumerate(outputs)
    ]
    # a reference of no steps returns constants, whose gradient is zero
    pairs = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if y.requires_grad]
    if not pairs:
        return [t.detach() for t in (*outputs, *map(torch.zeros_like, leaves))]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], leaves, [dy for _, dy in pairs], materialize_grads=True
    )
    return [t.detach() for t in (*outputs, *grads)]


def assert_near(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float, what: str = "", floor: float = 0.0
) -> None:
    """|actual - expected| <= factor * epsilon(dtype) * max(floor, max |expected|).

    `floor` is for results of few elements, of which each may be a small difference of terms that large.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if expected.numel() == 0:
        return
    error = (actual.double().to(expected.device) - expected.double()).abs().max().item()
    scale = max(floor, expected.double().abs().max().item())
    bound = factor * torch.finfo(dtype).eps * scale
    assert error <= bound, (
        f"{what}: error {error:.3g} = {error / max(bound, 1e-300) * factor:.3g} epsilons of {scale:.3g}"
    )


def check_case(
    case: Case, dtype: torch.dtype, factor: float, results: list[Tensor] | None = None, floor: float = 0.0
) -> None:
    """The op's outputs and gradients (or `results`, computed elsewhere) against the reference in fp64."""
    inputs, op, ref = case
    if results is None:
        results = with_gradients(op, inputs)
    expected = with_gradients(ref, [t.double() for t in inputs], like=results)
    assert len(results) == len(expected)
    outputs = len(results) - len(inputs)
    for i, (a, e) in enumerate(zip(results, expected, strict=True)):
        if i >= outputs:
            assert a.dtype == inputs[i - outputs].dtype, "a gradient has its input's dtype"
        assert_near(
            a, e, dtype, factor, f"output {i}" if i < outputs else f"gradient of input {i - outputs}", floor
        )


def assert_same(results: list[Tensor], expected: list[Tensor], factor: float = 32) -> None:
    """The same bits; on CUDA, whose products choose an algorithm by the layout, to `factor` epsilons."""
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        if b.device.type == "cpu":
            assert torch.equal(a, b), f"result {i}"
        else:
            assert_near(a, b, b.dtype, factor, f"result {i}")


def assert_same_for_all_thread_counts(
    function: Callable[[], list[Tensor]], counts: tuple[int, ...] = (1, 2, 3)
) -> None:
    """The same bits with as many threads as each of the counts."""
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        results.append(function())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def variational_dropout_case(
    dtype: torch.dtype,
    shape: tuple[int, ...] = (3, 5, 77),
    p: float = 0.4,
    seed: int = 5,
    batch_first: bool = True,
) -> Case:
    batch = shape[0 if batch_first else 1]
    features = int(torch.tensor(shape[2:]).prod())
    mask = mask64(seed, (batch, features), p)
    return (
        [randn(*shape, dtype=dtype)],
        lambda x: (ops.variational_dropout(x, p, seed=seed, batch_first=batch_first),),
        lambda x: (reference.variational_dropout(x, mask, batch_first=batch_first),),
    )


def embedding_dropout_case(
    dtype: torch.dtype,
    words: int = 50,
    width: int = 37,
    ids_shape: tuple[int, ...] = (4, 60),
    p: float = 0.3,
    seed: int = 3,
    padding_idx: int | None = 1,
) -> Case:
    ids = torch.randint(words, ids_shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    mask = mask64(seed, (words,), p)
    return (
        [randn(words, width, dtype=dtype)],
        lambda w: (ops.embedding_dropout(w, ids, p, seed=seed, padding_idx=padding_idx),),
        lambda w: (reference.embedding_dropout(w, ids, mask, padding_idx=padding_idx),),
    )


def concat_pool_case(
    dtype: torch.dtype,
    batch: int = 4,
    time: int = 9,
    hidden: int = 300,
    lengths: tuple[int, ...] = (9, 0, 1, 5),
) -> Case:
    n = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    return (
        [randn(batch, time, hidden, dtype=dtype)],
        lambda out: (ops.concat_pool(out, n),),
        lambda out: (reference.concat_pool(out, n),),
    )


def lstm_case(
    dtype: torch.dtype,
    time: int = 5,
    batch: int = 3,
    inputs: int = 7,
    hidden: int = 33,
    *,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    weight_p: float = 0.5,
    seed: int = 11,
    batch_first: bool = False,
    lengths: tuple[int, ...] | None = None,
    reverse: bool = False,
    dropout_p: float | None = None,
) -> Case:
    weight_dtype = weight_dtype or dtype
    shape = (batch, time, inputs) if batch_first else (time, batch, inputs)
    tensors = [
        randn(*shape, dtype=dtype),
        randn(batch, hidden, dtype=dtype),
        randn(batch, hidden, dtype=dtype, seed=1),
    ]
    for i, weight_shape in enumerate(
        [(4 * hidden, inputs), (4 * hidden, hidden)] + [(4 * hidden,)] * 2 * bias
    ):
        tensors.append(randn(*weight_shape, dtype=weight_dtype, seed=2 + i, scale=hidden**-0.5))
    n = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    options = {"batch_first": batch_first, "lengths": n, "reverse": reverse}
    drawn = {"weight_p": weight_p, "seed": seed}
    if dropout_p is not None:
        drawn |= {"dropout_p": dropout_p, "dropout_seed": seed + 1}

    def in_fp64(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        # drawn here: large masks take long in numpy, and not every test has a use for the reference
        mask = mask64(seed, (4 * hidden, hidden), weight_p).to(x.device)
        output_mask = None
        if dropout_p is not None:
            output_mask = mask64(seed + 1, (batch, hidden), dropout_p).to(x.device)
        return reference.lstm(x, *others, mask=mask, output_mask=output_mask, **options)

    return tensors, lambda *t: ops.lstm(*t, **drawn, **options), in_fp64


def linear_cross_entropy_case(
    dtype: torch.dtype,
    shape: tuple[int, ...] = (4, 9),
    features: int = 21,
    words: int = 50,
    *,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Case:
    weight_dtype = weight_dtype or dtype
    target = torch.randint(words, shape, generator=torch.Generator().manual_seed(9))
    target.view(-1)[::5] = ignore_index
    target = target.to(DEVICE)
    tensors = [
        randn(*shape, features, dtype=dtype),
        randn(words, features, dtype=weight_dtype, scale=features**-0.5),
    ]
    tensors += [randn(words, dtype=weight_dtype)] * bias
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}

    def loss(function: Callable) -> Callable:
        return lambda h, w, b=None: (function(h, w, b, target, **options),)

    return tensors, loss(ops.linear_cross_entropy), loss(reference.linear_cross_entropy)


def logits_case(
    dtype: torch.dtype, rows: int = 7, features: int = 45, words: int = 301, **options: torch.dtype
) -> Case:
    """No gradient is asked of it: what comes out is cut off."""
    (h, *weights), _, _ = linear_cross_entropy_case(dtype, (rows,), features, words, **options)
    return (
        [h, *weights],
        lambda *t: (torch.ops.ulmfit_fast.logits(*(x.detach() for x in t), False),),
        lambda *t: (torch.nn.functional.linear(*(x.detach() for x in t)),),
    )


# What isa_probe.py runs under every instruction set: edges of 4, 8 and 16 lanes, and of AMX's 16 x 32 tiles.
ISA_CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "variational_dropout": lambda dtype: variational_dropout_case(dtype, (2, 3, 149)),
    "embedding_dropout": embedding_dropout_case,
    "concat_pool": concat_pool_case,
    "lstm": lambda dtype: lstm_case(
        dtype, 4, 19, 21, 45, lengths=tuple(i % 5 for i in range(19)), dropout_p=0.4
    ),
    "lstm_wide": lambda dtype: lstm_case(dtype, 2, 33, 70, 130, batch_first=True, reverse=True, bias=False),
    # sizes and DropConnect enough for the product that leaves out what is dropped, and edges of it
    "lstm_sparse": lambda dtype: lstm_case(
        dtype, 3, 76, 20, 290, weight_p=0.6, lengths=tuple(3 - (i % 9 == 1) for i in range(76)), dropout_p=0.4
    ),
    # 7 rows: groups of 4, 2 and 1 for the weights that are not packed
    "lstm_unpacked": lambda dtype: lstm_case(
        dtype, 2, 7, 45, 37, weight_p=0.0, lengths=(2, 2, 1, 2, 0, 2, 2)
    ),
    "linear_cross_entropy": lambda dtype: linear_cross_entropy_case(dtype, (67,), 45, 301),
    "logits": logits_case,
    "logits_packed": lambda dtype: logits_case(dtype, 67),
}
