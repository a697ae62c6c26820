"""`learn.distrib_ctx()` with our AWD_LSTM: two processes, gloo, on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks_fastai import write_reviews

pytest.importorskip("accelerate", reason="fastai's distrib_ctx needs accelerate")
pytestmark = pytest.mark.cpu_only("runs in processes of its own, on the CPU")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_train_one_model(tmp_path):
    data, out = write_reviews(tmp_path / "reviews"), tmp_path / "out"
    out.mkdir()
    script = Path(__file__).parent / "fastai_ranks.py"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, script, data, out],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    first, second = (torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2))
    for kind, batches in first.pop("batches").items():
        mine, other = first[kind], second[kind]
        assert mine["moved"] and mine["losses"].isfinite().all()
        assert len(mine["losses"]) == 2 * -(-batches // 2)  # two epochs of half of the batches each
        assert all(torch.equal(a, b) for a, b in zip(mine["parameters"], other["parameters"], strict=True))
