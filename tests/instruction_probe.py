"""The calls that test_instruction_counts.py counts: of `_kernels` alone, as torch takes valgrind a minute."""

import _kernels as kernels
import numpy as np

T, B, I, H = 12, 24, 96, 128  # noqa: E741
N, E, V = 192, 96, 1024

rng = np.random.default_rng(0)
shapes = (T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,)
x, h0, c0, w_ih, w_hh, b = inputs = [rng.uniform(-0.1, 0.1, shape).astype("f4") for shape in shapes]
y, _, _, gates, cells = kernels.lstm("avx2", *inputs, seed=1, weight_p=0.5)
kernels.lstm_backward("avx2", y, x, h0, c0, w_ih, w_hh, y, gates, cells, seed=1, weight_p=0.5)
h, weight = (rng.uniform(-0.1, 0.1, shape).astype("f4") for shape in ((N, E), (V, E)))
kernels.linear_cross_entropy("avx2", h, weight, np.zeros(V, "f4"), rng.integers(0, V, N))
print(T * B * 4 * H * (I + H), N * E * V)
