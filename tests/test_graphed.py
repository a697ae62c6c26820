"""Training steps from a CUDA graph have the step's own numbers; without a GPU, what is around the graph."""

import contextlib
import types

import pytest
import torch
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import graphed, runs

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, _ = sentences()
OPTIONS = TINY | SIZES | dict(epochs=3, lr=0.03)


class Machine:
    """A step with carried state: it becomes half of itself plus the batch's mean; the figure is its sum."""

    def __init__(self):
        self.hidden = [(torch.zeros(2), torch.zeros(2))]

    def step(self, batch):
        h, c = self.hidden[0]
        self.hidden = [(h / 2 + batch[0].mean(), c + 1)]
        return {"loss": self.hidden[0][0].sum()}

    def set_hidden(self, hidden):
        self.hidden = hidden


@pytest.fixture
def pretended_graph(monkeypatch):
    """CUDA graphs on a CPU: a capture leaves the state alone, a replay runs the step on the same tensors."""

    class Graph:
        def replay(self):
            me = self.owner
            figures = me.step(me.batch)
            for name, value in figures.items():
                me.figures[name].copy_(value)
            for layer, new in zip(me.hidden, me.get_hidden(), strict=True):
                for state, value in zip(layer, new, strict=True):
                    state.copy_(value)
            me.set_hidden([tuple(layer) for layer in me.hidden])

    @contextlib.contextmanager
    def capture(graph, stream):
        assert stream is graph.owner.side_stream, "torch's own is one of the device that captured first"
        before = [[state.clone() for state in layer] for layer in graph.owner.hidden]
        yield
        for layer, old in zip(graph.owner.hidden, before, strict=True):
            for state, value in zip(layer, old, strict=True):
                state.copy_(value)

    def owned(machine):
        step = graphed.GraphedStep(
            machine.step, torch.device("cpu"), lambda: machine.hidden, machine.set_hidden
        )
        monkeypatch.setattr(Graph, "owner", step, raising=False)
        monkeypatch.setattr(step, "_aside", lambda function: function())
        step.side_stream = object()
        return step

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return owned


def test_every_call_is_one_step_whatever_the_shapes(pretended_graph):
    eager, machine = Machine(), Machine()
    step = pretended_graph(machine)
    generator = torch.Generator().manual_seed(0)
    for i, length in enumerate([4, 4, 3, 4, 4, 4, 3, 4, 4, 3, 4]):
        if i == 8:  # an epoch begins: state from elsewhere, and other layers train
            for each in (eager, machine):
                each.hidden = [(torch.ones(2), torch.ones(2))]
            step.forget()
        batch = (torch.randn(length, generator=generator),)
        assert step(batch) == eager.step(batch)
        assert all(map(torch.equal, machine.hidden[0], eager.hidden[0]))
        assert (step.graph is not None) == (4 <= i < 8), "captured after three steps of one shape"


def test_warm_ups_share_one_stream(monkeypatch):
    made, machine = [], Machine()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(stream) or stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    step = graphed.GraphedStep(machine.step, torch.device("cpu"), lambda: machine.hidden, machine.set_hidden)
    for _ in range(graphed.WARM_UPS):
        step((torch.ones(4),))
    assert len(made) == 1


def test_a_graph_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device, got device='cpu'"):
        uf.pretrain_lm(TEXTS, tmp_path / "lm", **OPTIONS | dict(device="cpu", cuda_graph=True))
    assert not (tmp_path / "lm").exists()


def test_losses_are_those_of_steps_launched_one_by_one(cuda, tmp_path):
    options = OPTIONS | dict(device=cuda, drop_mult=0.0)
    losses = []
    for use in (False, True):
        out = tmp_path / str(use)
        lm = uf.pretrain_lm(TEXTS, out, cuda_graph=use, **options)
        uf.finetune_lm(lm, TEXTS, tmp_path / f"{use}-tuned", cuda_graph=use, progress=False, device=cuda)
        losses.append([
            line["loss"] for path in (out, tmp_path / f"{use}-tuned") for line in runs.read_history(path)
        ])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_captures_after_the_first(tmp_path):
    losses = []
    for device in ("cuda:0", "cuda:1"):
        out = tmp_path / device[-1]
        uf.pretrain_lm(TEXTS, out, cuda_graph=True, **OPTIONS | dict(device=device, drop_mult=0.0))
        losses.append([line["loss"] for line in runs.read_history(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_masks_are_new_at_every_replay(cuda, tmp_path):
    """With a rate of zero the weights stay, so that a repeated batch's loss differs by its masks alone."""
    text = [TEXTS[0]] * 200
    lm = uf.pretrain_lm(
        text, tmp_path / "lm", cuda_graph=True, **OPTIONS | dict(device=cuda, lr=0.0, bptt=10)
    )
    losses = [line["loss"] for line in runs.read_history(lm.path)]
    assert len(set(losses[10:])) > len(losses[10:]) // 2
