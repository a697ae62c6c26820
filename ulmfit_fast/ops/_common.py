"""What the ops share: seeds, autocast, checks that name the argument, what their gradients cannot do."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Seed = int | Tensor | None
Precision = Literal["highest", "high", "medium"]
_SEED_MASK = 2**63 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: its multiples differ in about half of their bits
Grads = tuple[Tensor | None, ...]  # what a backward returns


def as_int(value: object) -> int | None:
    """value where it is an integer, of Python, NumPy or a graph's symbols; else, and for a bool, None."""
    if isinstance(value, (int, torch.SymInt)):
        # a graph's symbol is typed as the int that it stands for
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    return int(value) if isinstance(value, numbers.Integral) else None


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python, NumPy or a graph's symbols, and no bool."""
    known = (int, float, numbers.Real, torch.SymInt, torch.SymFloat)
    return isinstance(value, known) and not isinstance(value, bool)


def check_size(name: str, value: int) -> int:
    """value as an int greater than zero."""
    size = as_int(value)
    if size is None:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if size <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return size


def check_seed(op: str, seed: Seed, name: str = "seed") -> Seed:
    """seed, an int being Python's."""
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.dtype == torch.int64 and seed.dim() == 0:
            return seed
        got = f"{seed.dtype} of shape {tuple(seed.shape)}"
    else:
        number = as_int(seed)
        if number is not None and -(2**63) <= number < 2**63:
            return number
        if number is not None:
            raise ValueError(f"{op}: {name} must fit in 64 signed bits, got {seed}")
        got = type(seed).__name__
    raise TypeError(f"{op}: {name} must be None, an int or a 0-dim int64 tensor, got {got}")


def seed_tensor(op: str, seed: Seed, p: float, device: torch.device | None, name: str = "seed") -> Tensor:
    """The seed as a 0-dim int64 tensor on `device`; None draws one from that device's default generator.

    With p == 0 nothing is dropped, so nothing is drawn and the generator does not advance.
    """
    seed = check_seed(op, seed, name)
    if isinstance(seed, Tensor):
        return seed if device is None else seed.to(device)
    if seed is None:
        if p == 0:
            return torch.zeros((), dtype=torch.int64, device=device)
        return draw_seed(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def draw_seed(device: torch.device | None) -> Tensor:
    """A seed drawn by `device` itself, so nobody waits for it, and a replayed CUDA graph draws another.
    torch.manual_seed seeds the generators of all devices.
    """
    return torch.randint(_SEED_MASK, (), dtype=torch.int64, device=device)


def derive_seed(seed: Seed, k: int) -> Seed:
    """Seed of the k-th mask of a module called with `seed`; k = 0 gives `seed` itself, None stays None."""
    return None if seed is None else seed ^ (k * _GOLDEN & _SEED_MASK)


def check_probability(op: str, name: str, p: float) -> float:
    """p as a float in [0, 1)."""
    if not is_number(p):
        raise TypeError(f"{op}: {name} must be a number in [0, 1), got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{op}: {name} must be a number in [0, 1), got {p}")
    return float(p)


def check_flag(op: str, **flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_tensor(
    op: str, name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """`value` is a tensor of one of `dtypes` on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, but the other tensors are on {device}")


def check_input(op: str, name: str, value: Tensor) -> None:
    """The first tensor of an op, which sets dtype and device: any floating dtype, any device."""
    check_tensor(op, name, value, FLOATS, value.device if isinstance(value, Tensor) else torch.device("cpu"))


def check_shape(op: str, name: str, value: Tensor, layout: str, shape: tuple[int, ...]) -> None:
    """`value` has `shape`, which the message also spells as `layout`, for example "(4H, I)"."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {layout} = {tuple(shape)}, got {tuple(value.shape)}")


def readable(value: Tensor) -> bool:
    """Whether the values of `value` may be checked here without a wait or a graph break.

    Not for a tensor subclass, under torch.compile or on another device: there the kernel checks them
    (RuntimeError; an assertion on CUDA).
    """
    if torch.compiler.is_compiling():
        return False
    plain = type(value) in (Tensor, torch.nn.Parameter) and torch._C._has_storage(value)  # vmap's has none
    return plain and value.device.type == "cpu" and get_proxy_mode() is None  # make_fx's values are a graph's


def check_range(
    op: str, name: str, value: Tensor, low: int, high: int, meaning: str, error: type[Exception]
) -> None:
    """low <= value < high for every element, where the elements can be read."""
    if not readable(value) or value.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest >= high:
        bad = smallest if smallest < low else largest
        raise error(f"{op}: {name} must be {meaning}, got {bad}")


def check_lengths(op: str, lengths: Tensor, batch: int, time: int, device: torch.device) -> Tensor:
    """lengths (B,), each in 0..T, as int64."""
    check_tensor(op, "lengths", lengths, (torch.int64, torch.int32), device)
    check_shape(op, "lengths", lengths, "(B,)", (batch,))
    if readable(lengths):  # checked here too: a graph would specialise on the number in the message
        check_range(
            op, "lengths", lengths, 0, time + 1, f"in 0..{time}, the number of time steps", ValueError
        )
    return lengths.long()


def autocast_dtype(value: Tensor) -> torch.dtype:
    """The dtype of an activation: autocast's where it is on (not for float64, as in torch), else its own."""
    device = value.device.type
    if value.dtype == torch.float64 or device == "meta":  # the meta device has no autocast, and raises
        return value.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


@overload
def autocast_weight(value: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def autocast_weight(value: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def autocast_weight(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A 16-bit weight in the `dtype` that autocast chose; a float32 one stays, as the ops can read it."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.bfloat16, torch.float16):
        return value
    return value.to(dtype) if autocast_dtype(value) == dtype else value


def _torch_allows_less(device_type: str) -> bool:
    """Whether torch's own setting allows float32 products to be less than float32's on such a device."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the newer setting is in use, torch.backends.<backend>.matmul.fp32_precision
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        return backend.matmul.fp32_precision in ("tf32", "bf16")


# A constant to torch.compile, which guards on this setting. `torch.compiler.assume_constant_result` says the
# same, but imports the whole compiler to do so.
_torch_allows_less._dynamo_marked_constant = True  # type: ignore[attr-defined]


def allows_high(op: str, precision: str | None, value: Tensor) -> bool:
    """Whether float32 products may be less than float32's own: asked for here, or by torch's own setting.

    On the CPU they may then be made of bfloat16 ones. On CUDA they are torch's own, so its setting alone says
    whether they may be TF32's.
    """
    if precision not in (None, "highest", "high", "medium"):
        raise ValueError(f"{op}: precision must be None, 'highest', 'high' or 'medium', got {precision!r}")
    if value.dtype != torch.float32:
        return False
    device_type = value.device.type
    if precision is not None and device_type != "cuda":
        return precision != "highest"
    allowed = _torch_allows_less(device_type)
    if allowed and precision == "highest":
        raise ValueError(
            f"{op}: precision='highest' on CUDA needs torch.set_float32_matmul_precision('highest'): the "
            "products are torch's own, and it allows TF32 now"
        )
    return allowed


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient with respect to any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def raise_second_derivative(op: str) -> NoReturn:
    raise RuntimeError(
        f"ulmfit_fast.{op}: second derivatives are not implemented (its gradient has no gradient); "
        f"ulmfit_fast.reference.{op} has them"
    )


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent or torch.func wants its gradient.

    torch would lose the tangent in silence, and speak of autograd.Function for the gradient.
    """
    given = [t for t in tensors if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        what = "forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) are not implemented"
    elif not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_gradtrackingtensor, given)):
        what = "torch.func's derivatives (grad, vjp, jacrev) are not implemented, torch.autograd's are"
    else:
        return
    raise NotImplementedError(f"ulmfit_fast.{op}: {what}; ulmfit_fast.reference.{op} has them")


def register_gradient(op: str, backward: Callable[..., Grads], setup_context: Callable[..., None]) -> None:
    """The autograd formula of `op`; its backward op gets one that only raises an explanation."""

    def checked(ctx: object, *grads: Tensor | None) -> Grads:
        refuse_transforms(op, *grads)
        return backward(ctx, *grads)

    def explain(ctx: object, *grads: Tensor | None) -> None:
        raise_second_derivative(op)

    torch.library.register_autograd(f"ulmfit_fast::{op}", checked, setup_context=setup_context)
    torch.library.register_autograd(f"ulmfit_fast::{op}_backward", explain)
