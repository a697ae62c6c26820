"""The language model's training step as one CUDA graph, beside the same step launched kernel by kernel.

python -m benchmarks.graph_step. A replay does what a step does: dropout masks are new ones, as the device
draws their seeds, and the hidden state is carried. Where a step cannot be captured the record says why.
A program of its own: a capture that fails can leave torch unfit for further measurements.
"""

import dataclasses
from functools import partial

import torch

from . import arguments, clocks, floors, harness, steps
from .harness import Side
from .train_step import step_flops

WARM_UPS = 3  # steps before the capture: libraries make their plans, the optimizer its state


class GraphedStep:
    """A `steps.Step` captured whole; run(mark) replays it."""

    def __init__(self, step, precision):
        self.step, self.precision, self.graph = step, precision, torch.cuda.CUDAGraph()
        for group in step.optimizer.param_groups:
            group["capturable"] = True
        step.model.reset()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UPS):
                step.take(precision)
            self.hidden = [tuple(state.clone() for state in layer) for layer in step.carrier.hidden]
            step.carrier.hidden = list(self.hidden)
            self.advance()
        torch.cuda.current_stream().wait_stream(side_stream)
        step.optimizer.zero_grad()
        with torch.cuda.graph(self.graph):
            self.loss = self.advance()
        self.check()

    def advance(self):
        """One step from the state in `self.hidden` to the state there."""
        self.step.carrier.hidden = list(self.hidden)
        loss = self.step.take(self.precision)
        for old, new in zip(self.hidden, self.step.carrier.hidden, strict=True):
            for target, source in zip(old, new, strict=True):
                target.copy_(source)
        return loss

    def check(self):
        """RuntimeError unless a replay changes the weights and leaves a finite loss."""
        before = [p.detach().clone() for p in self.step.parameters]
        self.graph.replay()
        torch.cuda.synchronize()
        if not torch.isfinite(self.loss):
            raise RuntimeError(f"the replayed step's loss is {float(self.loss)}")
        if all(torch.equal(old, new) for old, new in zip(before, self.step.parameters, strict=True)):
            raise RuntimeError("the replayed step changes no weight")

    def run(self, mark):
        begin = mark()
        self.graph.replay()
        return begin, mark()


def measure(case, args, roof, clock):
    sides, running = [], []
    for library in ("ours", "torch"):
        for p in args.precision:
            eager = Side(library, p, None, device=args.device)
            running.append(dataclasses.replace(eager, run=partial(steps.build(case, library).run, p)))
            sides.append(dataclasses.replace(eager, variant="CUDA graph"))
    for side in sides:
        graphed = side.attempt(lambda s=side: GraphedStep(steps.build(case, s.package), s.precision))
        if graphed:
            running.append(dataclasses.replace(side, run=graphed.run))
    seconds = harness.interleave(running, args.repeats, clock=clock)
    flops = step_flops(case)
    record = {"shapes": {"tokens": case.tokens, "vocab": case.vocab}, "flops": flops, "sides": {}}
    traffic = floors.step_bytes(steps.build(case, "ours").parameters)
    for side in running:
        if side.name in seconds:
            figures = harness.figures(side, seconds[side.name])
            figures["tokens_per_s"] = round(1e3 * case.tokens / figures["total_ms"]["median"], 1)
            harness.add_rates(figures, roof, flops)
            record["sides"][side.name] = floors.add_floor(figures, roof, flops, traffic)
    return record | harness.failures([*sides, *running])


def main():
    parser = arguments.options(__doc__, on_gpu=("bf16",), device="cuda")
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    args = arguments.parse(parser)
    if args.device != "cuda":
        parser.error("argument --device: CUDA graphs are of cuda")
    clock = clocks.make(args.device, whole_steps=True)
    for threads, roof in harness.places(args):
        for batch in args.batch:
            for vocab in args.vocab:
                case = steps.Case("lm", args.preset, batch, args.bptt, vocab, args.device)
                cases = {"lm step": measure(case, args, roof, clock)}
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": vocab}
                harness.publish(args, "graph_step", threads, sizes, roof, cases, clock)


if __name__ == "__main__":
    main()
