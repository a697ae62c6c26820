"""One run by several processes, as torchrun starts them: each computes its share of the rows of every batch.

torch's DistributedDataParallel averages the gradients, so the weights stay the same in all processes, and
the first one writes the run directory. batch_size remains the run's: more processes are a shorter run with
the same numbers, up to rounding, the dropout masks, and the rows that batch norm sees.
"""

import atexit
import contextlib
import os
import pickle

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .runs import RunDirectory

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
_hosts = {}  # {default process group: a group of the same processes that talk over the host}


class Team:
    """The processes of a run, and what they tell each other; alone (size 1) nothing is sent.

    Every process calls every method, in the same order. It takes the default process group of
    torch.distributed, and makes it where torchrun has started the process and nobody has made it yet.

    device: the run's; `self.device` is this process's, as each process of a machine has its own GPU.
    """

    def __init__(self, device):
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
    def is_first(self):
        return self.rank == 0

    def first(self, call):
        """call() in the first process. What it returns, or raises, every process returns or raises."""
        if self.size == 1:
            return call()
        outcome, caught = [None], None
        if self.is_first:
            try:
                outcome = [(call(), None)]
            except BaseException as error:  # KeyboardInterrupt too: the others must not wait for ever
                outcome, caught = [(None, _sendable(error))], error
        dist.broadcast_object_list(outcome, 0, self._host)
        result, error = outcome[0]
        if error is not None:
            raise caught or error
        return result

    def gather(self, value):
        """[value of the first process, of the second, ...], in all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self._host)
        return values

    def any(self, flag):
        """Whether `flag` is true in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32, device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._host)
        return bool(flags)

    def sum(self, figures):
        """{name: sum over the processes} of numbers."""
        if self.size == 1 or not figures:
            return figures
        totals = torch.tensor(list(figures.values()), dtype=torch.float64, device="cpu")
        dist.all_reduce(totals, dist.ReduceOp.SUM, self._host)
        return dict(zip(figures, totals.tolist(), strict=True))

    def share(self, batch):
        """(the rows of `batch` for this process, their weight): the mean over the processes of weighted means
        is the mean over the batch. A batch of fewer than two rows a process, too few for batch norm, is
        computed whole by each.
        """
        rows = len(batch[0])
        if self.size == 1 or rows < 2 * self.size:
            return batch, 1.0
        mine = tuple(tensor[self.rank :: self.size] for tensor in batch)
        return mine, len(mine[0]) * self.size / rows

    def wrap(self, model):
        """`model`, with gradients that are averaged over the processes: those that require one now."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

    def equalise(self, model):
        """Gives all processes the first one's buffers, batch norm's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def own_randomness(self, seed):
        """Dropout masks of its own for each process but the first, whose are those of a run alone."""
        if not self.is_first:
            torch.manual_seed(seed + (self.rank << 32))

    def directory(self, out, resume, overwrite):
        """The run directory `out`; see RunDirectory."""
        if self.size == 1:
            return RunDirectory(out, resume, overwrite)
        return _SharedDirectory(self, self.first(lambda: RunDirectory(out, resume, overwrite)))


class _SharedDirectory:
    """A RunDirectory in which the first process writes and reads, and of which all hear the same."""

    def __init__(self, team, directory):
        self._team, self._directory, self.path = team, directory, directory.path

    def __getattr__(self, name):
        method = getattr(self._directory, name)

        def call(*arguments):
            return self._team.first(lambda: method(*arguments))

        return call

    def holds_finished(self, record):
        if len(set(self._team.gather((record["data"], record["config"])))) > 1:
            raise ValueError("the processes of a run need the same data and options, and have others")
        return self._team.first(lambda: self._directory.holds_finished(record))

    @contextlib.contextmanager
    def begin(self, record, tokenizer):
        with contextlib.ExitStack() as held:
            begin = self._directory.begin(record, tokenizer)
            yield self._team.first(lambda: held.enter_context(begin))


def is_first_process():
    """Whether this process speaks for its team, or has none."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _own_gpu():
    """Makes the GPU of this process's place on its machine torch's current one; returns it. A process that
    torchrun has not started has chosen its GPU already.
    """
    place, count = int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device()), torch.cuda.device_count()
    if place >= count:
        raise ValueError(f"process {place} of this machine has no GPU: torch sees {count}; start as many")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _sendable(error):
    """`error`, or a RuntimeError with its text where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does in there
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave():
    if dist.is_initialized():
        dist.destroy_process_group()
