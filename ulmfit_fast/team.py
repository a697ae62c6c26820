"""One run by several processes, as torchrun starts them: each computes its share of the rows of every batch.

torch's DistributedDataParallel averages the gradients, so the weights stay the same in all processes, and
the first one writes the run directory. batch_size is that of the whole run: more processes give the results
of one process in less time, except for rounding, the dropout masks, and the rows that batch norm sees.
"""

import atexit
import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .runs import RunDirectory
from .text import Tokenizer

_T = TypeVar("_T")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
# {default process group: a gloo group of the same processes, for objects on the host}
_hosts: dict[Any, Any] = {}


class Team:
    """The processes of a run, and what they send each other; nothing in a run of one process.

    Every process calls every method, in the same order. They use the default process group of
    torch.distributed, which is created here if torchrun started the process and nobody has created it yet.

    Args:
        device: the run's. `self.device` is this process's: each process of a machine has its own GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device
        if not dist.is_available():
            return
        if not dist.is_initialized():
            if not all(os.environ.get(name) for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
                return
            if device.type == "cuda":
                _own_gpu()  # before NCCL looks for it
            dist.init_process_group(None if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size == 1:
            return
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"device={str(device)!r} is one GPU, for {self.size} processes; give 'cuda'")
            self.device = _own_gpu()
        world = dist.group.WORLD
        if world not in _hosts:
            _hosts[world] = dist.new_group(backend="gloo")
        self._host = _hosts[world]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def run_on_first(self, call: Callable[[], _T]) -> _T:
        """Calls call() in the first process. What it returns or raises, every process returns or raises."""
        if self.size == 1:
            return call()
        outcome: list[Any] = [None]
        caught: BaseException | None = None
        if self.is_first:
            try:
                outcome = [(call(), None)]
            except BaseException as raised:  # KeyboardInterrupt too: the others must not wait for ever
                outcome, caught = [(None, _sendable(raised))], raised
        dist.broadcast_object_list(outcome, 0, self._host)
        result, error = outcome[0]
        if error is not None:
            raise caught or error
        return result

    def gather(self, value: _T) -> list[_T]:
        """[value of the first process, of the second, ...], in all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self._host)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._host)
        return bool(flags)

    def sum(self, figures: dict[str, float]) -> dict[str, float]:
        """{name: sum over the processes} of numbers."""
        if self.size == 1 or not figures:
            return figures
        totals = torch.tensor(list(figures.values()), dtype=torch.float64, device="cpu")
        dist.all_reduce(totals, dist.ReduceOp.SUM, self._host)
        return dict(zip(figures, totals.tolist(), strict=True))

    def share(self, batch: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], float]:
        """(the rows of `batch` for this process, the weight of their loss).

        The mean over the processes of the weighted losses is the mean over the batch. A batch of fewer than
        two rows per process, too few for batch norm, is computed whole by each.
        """
        rows = len(batch[0])
        if self.size == 1 or rows < 2 * self.size:
            return batch, 1.0
        mine = tuple(tensor[self.rank :: self.size] for tensor in batch)
        return mine, len(mine[0]) * self.size / rows

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, with gradients that are averaged over the processes: those that require one now."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def equalise(self, model: nn.Module) -> None:
        """Gives all processes the first one's buffers, batch norm's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def own_randomness(self, seed: int) -> None:
        """Gives each process dropout masks of its own; the first has those of a run of one process."""
        if not self.is_first:
            torch.manual_seed(seed + (self.rank << 32))

    def directory(
        self, out: str | os.PathLike[str], resume: bool, overwrite: bool
    ) -> "RunDirectory | _SharedDirectory":
        """The run directory `out`; see RunDirectory."""
        if self.size == 1:
            return RunDirectory(out, resume, overwrite)
        return _SharedDirectory(self, self.run_on_first(lambda: RunDirectory(out, resume, overwrite)))


class _SharedDirectory:
    """A RunDirectory that only the first process reads and writes; all processes get its answers."""

    def __init__(self, team: Team, directory: RunDirectory) -> None:
        self._team, self._directory, self.path = team, directory, directory.path

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._directory, name)

        def call(*arguments: Any) -> Any:
            return self._team.run_on_first(lambda: method(*arguments))

        return call

    def holds_finished(self, record: dict[str, Any]) -> bool:
        if len(set(self._team.gather((record["data"], record["config"])))) > 1:
            raise ValueError("the processes of a run need the same data and options, but theirs differ")
        return self._team.run_on_first(lambda: self._directory.holds_finished(record))

    @contextlib.contextmanager
    def begin(self, record: dict[str, Any], tokenizer: Tokenizer) -> Iterator[dict[str, Any] | None]:
        with contextlib.ExitStack() as held:
            begin = self._directory.begin(record, tokenizer)
            yield self._team.run_on_first(lambda: held.enter_context(begin))


Directory = RunDirectory | _SharedDirectory


def is_first_process() -> bool:
    """Whether this process speaks for its team, or has none."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _own_gpu() -> torch.device:
    """Selects and returns the GPU of this process's local rank. A process that torchrun did not start has
    selected its GPU already.
    """
    place, count = int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device()), torch.cuda.device_count()
    if place >= count:
        raise ValueError(f"process {place} of this machine has no GPU: torch sees {count}; start no more")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _sendable(error: BaseException) -> BaseException:
    """`error`, or a RuntimeError with its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the class's own code runs here
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
