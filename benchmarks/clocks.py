"""The clocks of the speed programs: wall time on the CPU, CUDA events on a GPU. All times are seconds.

A side's run(mark) does its work once and returns the marks that it took; `sample` turns them into seconds
since the first of them: one number, or (forward, forward + backward) where there are three marks.
"""

import statistics
import time
from dataclasses import dataclass

import torch

WARM_UPS = 3
CALLS = 3, 30  # fewest (on a GPU) and most calls of a round
ROUND = 0.04  # seconds that a round of one side should take
SPIN_RATE = (
    2e9  # clock of the kernel that only waits, in Hz: about that of current cards; `SPARE` is a margin
)
SPARE = 1.5


@dataclass(frozen=True)
class Plan:
    """What warming up found out about a side on a GPU."""

    calls: int  # in one round
    wait: float  # seconds that the GPU is held before each call, so that the host can queue all of it
    host: float  # seconds in which the host queued one call
    back_to_back: float | None = None  # seconds a call where calls follow each other; None: they always do


class WallClock:
    """Wall time. The first of a side's calls in a row does not count: it finds memory and caches as another
    side left them, while in training it would find its own. Then one call counts, or the median of as many as
    fill a round.
    """

    mark = staticmethod(time.perf_counter)

    def warm_up(self, run):
        """Nothing: each sample warms up."""

    def sample(self, run, plan=None):
        run(self.mark)
        samples, spent = [], 0.0
        while spent < ROUND and len(samples) < CALLS[1]:
            samples.append(_intervals(run(self.mark), lambda begin, end: end - begin))
            spent += _last(samples[-1])
        return _median(samples)

    def describe(self):
        """What a record says about the clock."""
        return {}


class EventClock:
    """CUDA events around each call; a round's sample is the median of its calls.

    ahead: before each call the GPU writes over its L2 cache (where `flush` is given) and waits until the host
    has queued the whole call, so that the device's time is measured and not how fast Python launches kernels.
    Otherwise calls follow each other as training steps do, and a host that cannot keep up shows. `cuda` is
    torch.cuda; flush() writes the cache over.
    """

    def __init__(self, ahead, flush=None, cuda=torch.cuda):
        self.ahead, self.flush, self.cuda = ahead, flush, cuda

    def mark(self):
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def warm_up(self, run):
        hosts = []
        for _ in range(WARM_UPS):
            begin = time.perf_counter()
            run(self.mark)
            hosts.append(time.perf_counter() - begin)
            self.cuda.synchronize()
        host = max(hosts[1:])  # the first call loads kernels
        total = _last(self._burst(run, 2, wait=0))
        back_to_back = _last(self._burst(run, CALLS[0], wait=0, flush=False)) if self.ahead else None
        wait = SPARE * min(host, 0.1) if self.ahead else 0.0
        calls = round(ROUND / max(total + wait, 1e-6))
        return Plan(min(max(calls, CALLS[0]), CALLS[1]), wait, host, back_to_back)

    def sample(self, run, plan):
        return self._burst(run, plan.calls, plan.wait)

    def _burst(self, run, calls, wait, flush=True):
        self.cuda.synchronize()
        if not wait:
            run(self.mark)  # the host starts level with the GPU: this call takes longer than those after it
        marks = []
        for _ in range(calls):
            if flush and self.flush:
                self.flush()
            if wait:
                self.cuda._sleep(int(wait * SPIN_RATE))
            marks.append(run(self.mark))
        self.cuda.synchronize()
        return _median([_intervals(m, lambda begin, end: begin.elapsed_time(end) / 1e3) for m in marks])

    def describe(self):
        empty = self._burst(lambda mark: (mark(), mark()), CALLS[1], wait=1e-4 if self.ahead else 0)
        return {
            "clock": "CUDA events around each call",
            "l2_flushed": self.flush is not None,
            "host_queues_ahead": self.ahead,
            "empty_call_us": round(1e6 * empty, 2),
        }


def _intervals(marks, between):
    seconds = tuple(between(marks[0], mark) for mark in marks[1:])
    return seconds if len(seconds) > 1 else seconds[0]


def _median(samples):
    if isinstance(samples[0], tuple):
        return tuple(map(statistics.median, zip(*samples, strict=True)))
    return statistics.median(samples)


def _last(seconds):
    return seconds[-1] if isinstance(seconds, tuple) else seconds


def make(device, whole_steps=False, keep_l2=False):
    """The clock of a device. whole_steps: sides are training steps, which follow each other."""
    if device == "cpu":
        return WallClock()
    if whole_steps or keep_l2:
        return EventClock(ahead=not whole_steps)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)
    return EventClock(ahead=True, flush=scratch.zero_)
