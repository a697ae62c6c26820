"""A training step as a CUDA graph: captured once, replayed without the host launching each kernel."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .devices import to_device
from .nn import State

Batch = tuple[Tensor, ...]
Figures = dict[str, Tensor]
Shapes = tuple[torch.Size, ...]
WARM_UPS = 3  # steps of a shape before its capture: libraries make their plans, the optimizer its state


class GraphedStep:
    """`step(batch) -> figures`, replayed from a graph once WARM_UPS batches of a shape were seen.

    The numbers are the step's own: every call is one step, captured or not.  The first shape seen so often is
    captured; batches of another shape (an epoch's last window) are stepped as before, kernel by kernel.

    step: forward, backward and update on `batch`, a tuple of tensors; it must not wait for the device, and
        what changes from step to step besides the batch (learning rates, seeds) must lie on the device.
    get_hidden, set_hidden: the state carried between steps, [(h, c)] per layer.
    """

    def __init__(
        self,
        step: Callable[[Batch], Figures],
        device: torch.device,
        get_hidden: Callable[[], list[State]],
        set_hidden: Callable[[list[State]], None],
    ) -> None:
        self.step, self.device = step, device
        self.get_hidden, self.set_hidden = get_hidden, set_hidden
        self.side_stream: torch.cuda.Stream | None = None
        self.forget()

    def forget(self) -> None:
        """Drops the graph: the step has changed (other layers train)."""
        self.graph: Any = None
        self.shapes: Shapes | None = None
        self.seen: Counter[Shapes] = Counter()

    def __call__(self, batch: Batch) -> Figures:
        shapes = tuple(tensor.shape for tensor in batch)
        if self.graph is None:
            self.seen[shapes] += 1
            if self.seen[shapes] <= WARM_UPS:
                return self._aside(lambda: self.step(batch))
            self._capture(batch, shapes)
        elif shapes != self.shapes:
            return self.step(batch)
        self._load(batch)
        self.graph.replay()
        return {name: value.clone() for name, value in self.figures.items()}

    def _aside(self, function: Callable[[], Figures]) -> Figures:
        """On a stream of its own, as capture wants its warm-ups."""
        if self.side_stream is None:
            self.side_stream = torch.cuda.Stream(self.device)
        stream = self.side_stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return result

    def _capture(self, batch: Batch, shapes: Shapes) -> None:
        self.shapes = shapes
        self.batch = tuple(tensor.to(self.device) for tensor in batch)
        self.hidden: list[State] = [(h.clone(), c.clone()) for h, c in self.get_hidden()]
        self.graph = torch.cuda.CUDAGraph()
        # records, runs nothing; torch's own stream would be one of whichever device captured first
        with torch.cuda.device(self.device), torch.cuda.graph(self.graph, stream=self.side_stream):
            self.set_hidden(list(self.hidden))
            self.figures = self.step(self.batch)
            for layer, new_layer in zip(self.hidden, self.get_hidden(), strict=True):
                for state, new_state in zip(layer, new_layer, strict=True):
                    state.copy_(new_state)
        self.set_hidden(list(self.hidden))

    def _load(self, batch: Batch) -> None:
        for static, tensor in zip(self.batch, batch, strict=True):
            static.copy_(to_device(tensor, self.device))
        for layer, now in zip(self.hidden, self.get_hidden(), strict=True):
            for state, new_state in zip(layer, now, strict=True):
                if state is not new_state:  # reset, or a step that was not the graph's
                    state.copy_(new_state)
        self.set_hidden(list(self.hidden))
