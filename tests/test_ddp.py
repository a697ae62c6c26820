"""Distributed data parallelism: gradients and carried state of one process with all rows."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import ulmfit_fast as uf

PROBE = pathlib.Path(__file__).parent / "ddp_probe.py"
pytestmark = [
    pytest.mark.cpu_only("two processes with gloo"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one process, the first of two, the second of two): what ddp_probe.py saved."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    runs = [
        subprocess.Popen([sys.executable, PROBE, rank, of, folder], env=environment, stderr=subprocess.PIPE)
        for rank, of in (("0", "1"), ("0", "2"), ("1", "2"))
    ]
    for run in runs:
        try:
            _, errors = run.communicate(timeout=300)
        finally:
            run.kill()
        assert run.returncode == 0, errors.decode()
    return [torch.load(folder / name) for name in ("0-of-1.pt", "0-of-2.pt", "1-of-2.pt")]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", ["language model", "classifier", "frozen encoder", "empty documents"])
def test_gradients_are_those_of_one_process(results, case):
    alone, *ranks = (result[case] for result in results)
    assert any(key.startswith("0.") for key in alone) != (case == "frozen encoder")
    assert all(gradient.any() for gradient in alone.values())
    for rank in ranks:
        close(rank, alone)


def test_each_process_carries_the_state_of_its_rows(results):
    alone, *ranks = (result["hidden"] for result in results)
    for layer, (h, c) in enumerate(alone):
        close(torch.cat([rank[layer][0] for rank in ranks], 1), h)
        close(torch.cat([rank[layer][1] for rank in ranks], 1), c)


def test_the_state_is_no_dtensor_where_fsdp_shards_the_weights():
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        lm = uf.LanguageModel(uf.AWDLSTM(30, 6, 10, 2)).double().eval()
        ids = torch.randint(30, (2, 5))
        expected = lm(ids)
        fully_shard(lm)
        lm.reset()
        close(lm(ids), expected)
    finally:
        torch.distributed.destroy_process_group()
