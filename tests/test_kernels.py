"""The torch-free kernels through numpy, for every instruction set, against definitions in fp64."""

import numpy as np
import pytest

from ulmfit_fast.reference import philox_mask

kernels = pytest.importorskip("ulmfit_fast._kernels", reason="built by editable and in-place builds alone")
ISAS = kernels.isas().split(",")
pytestmark = pytest.mark.cpu_only("the kernels without torch are the CPU's")


def bf16_bits(a):
    """float32 -> the bits of the nearest bf16 (ties to even), as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def lstm_definition(x, h, c, w_ih, w_hh, b, mask):
    """x (T,B,I), h, c (B,H), w_ih (4H,I), w_hh and mask (4H,H), b (4H), all float64 -> y (T,B,H)."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    y = []
    for step in x:
        i, f, g, o = np.split(step @ w_ih.T + h @ (w_hh * mask).T + b, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        y.append(h)
    return np.stack(y)


def lstm_inputs(T=7, B=5, I=13, H=40):  # noqa: E741
    rng = np.random.default_rng(0)
    shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,)]
    return [rng.uniform(-1, 1, shape) * (1 if len(shape) != 2 else 0.5) for shape in shapes]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [0, 1, 64, 1000])
def test_masks_are_the_definition(isa, n):
    expected = philox_mask(2**63 + 12345, (n,), 0.3)
    assert np.array_equal(kernels.dropout_mask(isa, 2**63 + 12345, 0.3, n, np.dtype("float64")), expected)
    assert np.array_equal(kernels.dropout_mask(isa, 2**63 + 12345, 0.3, n), expected.astype(np.float32))


# 16-bit types round the output and, through derivatives below 1, the hidden state of each step before;
# fp32 and fp64 round in each of about 50 additions.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "dtype, tolerance", [("f64", 1e-13), ("f32", 1e-5), ("f16", 9 * 2**-10), ("bf16", 9 * 2**-7)]
)
def test_lstm_is_the_definition(isa, dtype, tolerance):
    inputs = lstm_inputs()
    if dtype == "bf16":
        stored = [bf16_bits(a) for a in inputs]
        inputs = [from_bf16(a).astype(np.float64) for a in stored]
    else:
        stored = [a.astype("f" + str(int(dtype[1:]) // 8)) for a in inputs]
        inputs = [a.astype(np.float64) for a in stored]
    mask = philox_mask(9, inputs[4].shape, 0.5)
    y = kernels.lstm(isa, *stored, seed=9, weight_p=0.5)[0]
    y = from_bf16(y) if dtype == "bf16" else y
    assert np.abs(y - lstm_definition(*inputs, mask)).max() <= tolerance


@pytest.mark.parametrize("isa", ISAS)
def test_lstm_backward_is_the_difference_quotient(isa):
    inputs = lstm_inputs(T=4, B=3, I=6, H=9)
    rng = np.random.default_rng(1)
    dy = rng.uniform(-1, 1, (4, 3, 9))
    mask = philox_mask(3, inputs[4].shape, 0.4)
    x, h0, c0, w_ih, w_hh, b = inputs
    y, _, _, gates, cells = kernels.lstm(isa, *inputs, seed=3, weight_p=0.4)
    grads = kernels.lstm_backward(isa, dy, x, h0, c0, w_ih, w_hh, y, gates, cells, seed=3, weight_p=0.4)
    for which, grad in enumerate(grads):
        direction = rng.uniform(-1, 1, grad.shape)
        up, down = list(inputs), list(inputs)
        up[which] = inputs[which] + 1e-6 * direction
        down[which] = inputs[which] - 1e-6 * direction
        slope = ((lstm_definition(*up, mask) - lstm_definition(*down, mask)) * dy).sum() / 2e-6
        assert abs(slope - (grad * direction).sum()) <= 1e-8 * max(1, abs(slope))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_definition(isa, smoothing):
    rng = np.random.default_rng(2)
    N, E, V = 11, 20, 150
    h, weight, bias = rng.normal(size=(N, E)), rng.normal(size=(V, E)), rng.normal(size=V)
    target = rng.integers(0, V, N)
    target[3] = -100
    results = kernels.linear_cross_entropy(isa, h, weight, bias, target, label_smoothing=smoothing)
    logits = h @ weight.T + bias
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = np.full((N, V), smoothing / V)
    wanted[np.arange(N), target] += 1 - smoothing  # row 3's -100 is overwritten below
    counted = (target != -100)[:, None]
    wanted *= counted
    dlogits = (np.exp(log_p) - wanted) * counted
    definition = [-(wanted * log_p).sum(1), dlogits @ weight, dlogits.T @ h, dlogits.sum(0)]
    for actual, expected in zip(results, definition, strict=True):
        assert np.abs(actual - expected).max() <= 1e-12 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
@pytest.mark.parametrize("words, value", [(2, np.inf), (140, np.inf), (slice(None), -np.inf), (140, np.nan)])
def test_cross_entropy_of_an_infinite_logit_is_nan(isa, dtype, words, value):
    rng = np.random.default_rng(4)
    stored = [rng.normal(size=(11, 20)), rng.normal(size=(150, 20)), np.zeros(150)]
    stored[2][words] = value
    if dtype == "bf16":
        stored = [bf16_bits(a) for a in stored]
    else:
        stored = [a.astype("f" + str(int(dtype[1:]) // 8)) for a in stored]
    target = rng.integers(0, 100, 11)
    target[3] = -100
    loss, *grads = kernels.linear_cross_entropy(isa, *stored, target)
    dh, dweight, dbias = (from_bf16(a) if dtype == "bf16" else a for a in grads)
    counted = target != -100
    assert np.isnan(loss[counted]).all() and np.isnan(dh[counted]).all()
    assert (loss[~counted] == 0).all() and (dh[~counted] == 0).all()
    assert np.isnan(dweight).all() and np.isnan(dbias).all()


def test_bad_arguments_are_named():
    x, h0, c0, w_ih, w_hh, b = lstm_inputs(T=2, B=2, I=3, H=4)
    with pytest.raises(ValueError, match="isa is 'mmx', but this machine can run"):
        kernels.dropout_mask("mmx", 0, 0.5, 3)
    with pytest.raises(ValueError, match="w_hh has shape"):
        kernels.lstm(ISAS[0], x, h0, c0, w_ih, w_hh[:, :2].copy(), b)
    with pytest.raises(ValueError, match="lengths must be within"):
        kernels.lstm(ISAS[0], x, h0, c0, w_ih, w_hh, b, lengths=np.array([0, 3]))
    with pytest.raises(TypeError, match="h0 has another dtype"):
        kernels.lstm(ISAS[0], x, h0.astype("f4"), c0, w_ih, w_hh, b)
    with pytest.raises(TypeError, match="w_ih must have the activations' dtype, or float32"):
        kernels.lstm(ISAS[0], x, h0, c0, w_ih.astype("f4"), w_hh.astype("f4"))
    with pytest.raises(TypeError, match="weight must have the activations' dtype, or float32"):
        kernels.linear_cross_entropy(ISAS[0], w_ih.astype("f4"), w_hh, b, np.zeros(16, dtype=np.int64))
    with pytest.raises(ValueError, match=r"x must be \(T, B, I\) and h0 \(B, H\), with I and H > 0"):
        kernels.lstm(ISAS[0], x[:, :, :0].copy(), h0, c0, w_ih[:, :0].copy(), w_hh)
    with pytest.raises(ValueError, match=r"weight_p must be in \[0, 1\), got 1.0"):
        kernels.lstm(ISAS[0], x, h0, c0, w_ih, w_hh, weight_p=1.0)
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1.5"):
        kernels.dropout_mask(ISAS[0], 0, 1.5, 3)
