"""The one training loop of all three stages: phases, schedules, logging, saving, stopping and going on."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .batches import Batches
from .config import Stage
from .graphed import Batch, Figures, GraphedStep
from .history import Line, Sums, perplexity
from .interrupts import DelayedInterrupt
from .nn import State
from .progress import Progress, Show
from .schedules import Phase
from .team import Directory, Team

Between = Callable[[], object] | None  # called after each batch of a validation
Validate = Callable[[Between], dict[str, float]]


class Loop:
    """Trains `model` and leaves everything in a run directory.

    Args:
        model: on the device where it trains.
        groups: lists of parameters, first layer group to last.
        plan: list of schedules.Phase.
        config: the stage's dataclass.
        run: the RunDirectory, which the caller has begun.
        team: the processes that train together.
        batches: batches(epoch) is the sequence of the epoch's batches, tuples of tensors, the last of which
            holds the targets; a function of the epoch alone.
        loss_of: loss_of(model, batch) is (loss to minimise, {name: mean over the batch's rows}); it gets
            `model`, or the team's wrapper of it.
        tokens_of: tokens_of(batch) is the number of tokens in a batch.
        validate: validate(between) gives the figures of the validation set; it calls between(), if not None,
            after each batch. None: there is no validation set.
        validate_first: whether to validate before the first step too.
        before_epoch: called without arguments before an epoch's first step.
        get_hidden, set_hidden: read and replace the state that is carried between steps, [(h, c)] per layer.
        title: what the progress bar is called.
        progress, callback: as in `train.pretrain_lm`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[nn.Parameter]],
        plan: list[Phase],
        config: Stage,
        run: Directory,
        *,
        team: Team,
        batches: Callable[[int], Batches],
        loss_of: Callable[[nn.Module, Batch], tuple[Tensor, Figures]],
        tokens_of: Callable[[Batch], int],
        validate: Validate | None = None,
        validate_first: bool = False,
        before_epoch: Callable[[], object] | None = None,
        get_hidden: Callable[[], list[State]] = list,
        set_hidden: Callable[[list[State]], None] = lambda hidden: None,
        title: str = "",
        progress: Show = None,
        callback: Callable[[Line], object] | None = None,
    ) -> None:
        self.model, self.groups, self.plan, self.config, self.run = model, groups, plan, config, run
        self.team, self.batches, self.loss_of, self.tokens_of = team, batches, loss_of, tokens_of
        self.validate = validate
        self.validate_first = validate_first
        self.before_epoch = before_epoch or (lambda: None)
        self.get_hidden, self.set_hidden = get_hidden, set_hidden
        self.title, self.progress, self.callback = title, progress, callback or (lambda line: None)
        self.device = groups[0][0].device
        graphed = getattr(config, "cuda_graph", False)
        factor = getattr(config, "discriminative", 1.0)
        self.factors = schedules.discriminative_lrs(1.0, len(groups), factor)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": config.lr * f} for group, f in zip(groups, self.factors, strict=True)],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=graphed,
        )
        self.take_step: Callable[[Batch], Figures] = self._take_step
        if graphed:
            self.take_step = GraphedStep(self._take_step, self.device, self.get_hidden, self.set_hidden)
        self._place_rates()
        self.epochs = sum(phase.epochs for phase in plan)
        self.epoch = self.batch = self.step = 0
        self.between_steps = True
        self.n_trainable, self.rate = 0, 0.0
        self.wrapped, self.loss_share = model, 1.0  # DDP-wrapped model; loss weight of this process's rows
        self.saved: int | None = None  # the step of the state that the directory holds
        self.bar: Progress | None = None
        self.since_line, self.in_epoch = Sums(), Sums()

    def train(self, state: dict[str, Any] | None = None) -> None:
        """Runs to the end from `state` (what `run.begin` gave back) or from the beginning.

        Ctrl-C or SIGTERM ends the step under way, or the batch of a validation, saves the state and raises
        KeyboardInterrupt; so does a KeyboardInterrupt of the callback, which is called with a metrics line
        after each logged step.

        Raises:
            FloatingPointError: the loss or a weight became infinite or NaN; what was saved before is kept.
            ValueError: `state` was saved by another number of processes.
        """
        self.model.train()
        if state is not None:
            self._restore(state)
        else:
            self.team.own_randomness(self.config.seed)
            if self.validate_first and self.validate:
                self._log_valid(0, self.validate(None))
        with DelayedInterrupt(self.team) as self.interrupt:
            try:
                while self.epoch < self.epochs:
                    self._train_epoch()
            except KeyboardInterrupt:
                if not self.between_steps:  # a second Ctrl-C inside a step: its update may be half done
                    raise
                self.save()
                self.run.plot()
                raise KeyboardInterrupt(
                    f"stopped after step {self.step}; the state is saved in {self.run.path}, "
                    "resume=True (--resume) goes on from there"
                ) from None
            finally:
                if self.bar:
                    self.bar.close()
        self._check_weights()
        self.run.finish(self.model)
        self.run.plot()

    def _train_epoch(self) -> None:
        batches = self.batches(self.epoch)
        first_epoch, phase = self._phase()
        steps = phase.epochs * len(batches)
        self._freeze(phase.n_trainable)
        if self.bar is None:
            self.bar = Progress(self.epochs * len(batches), self.step, self.title, self.progress)
        if self.batch == 0:
            self.before_epoch()
        while self.batch < len(batches):
            self._set_rate((self.epoch - first_epoch) * len(batches) + self.batch, steps)
            self.between_steps = False
            self._account(batches[self.batch])
            self.batch, self.step = self.batch + 1, self.step + 1
            self.between_steps = True
            line = None
            if self.step % self.config.log_every == 0 or self.batch == len(batches):
                line = self._log()
            self.bar.step(self.epoch + 1, line)
            if self.config.save_every and self.step % self.config.save_every == 0:
                self.save()
            if line:
                self._tell(line)
            self.interrupt.check()
        if self.since_line.targets:  # interrupted after the last step, before its line was written
            self._log()
        self.team.equalise(self.model)
        # an interrupt in here loses nothing: the epoch's lines are written after it
        figures = self.validate(self.interrupt.check) if self.validate else None
        line = self._line("epoch", self.in_epoch)
        self.run.log(line)
        valid = figures and self._log_valid(self.epoch + 1, figures)
        self.bar.epoch(self.epoch + 1, self.epochs, line, valid)
        self.epoch, self.batch, self.in_epoch = self.epoch + 1, 0, Sums()
        if self.epoch < self.epochs:
            self.save()
            self.run.save_model(self.model)
        self.interrupt.check()

    def _phase(self) -> tuple[int, Phase]:
        """(first epoch, phase) of the present epoch. The rate has a schedule of its own in each phase."""
        first = 0
        for phase in self.plan:
            if self.epoch < first + phase.epochs:
                return first, phase
            first += phase.epochs
        raise IndexError(self.epoch)

    def _freeze(self, n_trainable: int) -> None:
        for position, group in enumerate(self.groups):
            for parameter in group:
                parameter.requires_grad_(position >= len(self.groups) - n_trainable)
        if n_trainable != self.n_trainable:
            self.wrapped = self.team.wrap(self.model)
            if isinstance(self.take_step, GraphedStep):
                self.take_step.forget()
        self.n_trainable = n_trainable

    def _set_rate(self, t: int, steps: int) -> None:
        c = self.config
        if c.schedule == "stlr":
            self.rate = schedules.stlr(t, steps, c.lr, c.cut_frac, c.ratio)
        elif c.schedule == "one_cycle":
            self.rate = schedules.one_cycle(t, steps, c.lr, pct_start=c.cut_frac)
        else:
            self.rate = c.lr
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.rate * factor)
            else:
                group["lr"] = self.rate * factor

    def _place_rates(self) -> None:
        """Puts learning rates on the device if steps replay a CUDA graph, which reads them there."""
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            graphed = isinstance(self.take_step, GraphedStep)
            group["lr"] = torch.tensor(rate, device=self.device) if graphed else rate

    def _take_step(self, batch: Batch) -> Figures:
        """One update. Nothing here may wait for the device, or a CUDA graph could not capture it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss, figures = self.loss_of(self.wrapped, batch)
        self.optimizer.zero_grad()
        (loss * self.loss_share).backward()
        if self.config.clip:
            trainable = [p for group in self.groups for p in group if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trainable, self.config.clip)
        self.optimizer.step()
        return {name: value.detach() for name, value in figures.items()}

    def _account(self, batch: Batch) -> None:
        start = time.perf_counter()
        mine, self.loss_share = self.team.share(batch)
        targets, tokens = batch[-1].numel(), self.tokens_of(batch)
        part = targets * self.loss_share / self.team.size
        totals = {name: x.double() * part for name, x in self.take_step(mine).items()}
        self.since_line.add(totals, targets, tokens, time.perf_counter() - start)

    def _log(self) -> Line:
        """Logs the means since the last line and adds the sums to the epoch's."""
        start = time.perf_counter()
        totals, targets, tokens, seconds = self.since_line.numbers()  # waits for the device
        sums = Sums(self.team.sum(totals), targets, tokens, seconds + time.perf_counter() - start)
        loss = sums.totals["loss"] / sums.targets
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} before step {self.step} at {self._advice()}")
        line = self._line("train", sums)
        self.run.log(line)
        self.in_epoch.add(*sums.numbers())
        self.since_line = Sums()
        return line

    def _line(self, kind: str, sums: Sums) -> Line:
        """A metrics line: means over the targets that `sums` holds, tokens or documents."""
        means = {name: total / sums.targets for name, total in sums.totals.items()}
        if "accuracy" not in means:
            means["perplexity"] = perplexity(means["loss"])
        place = {"kind": kind, "step": self.step, "epoch": self.epoch + 1}
        speed = sums.tokens / max(sums.seconds, 1e-9)
        return {**place, **means, "lr": self.rate, "tokens_per_s": round(speed, 1)}

    def _tell(self, line: Line) -> None:
        def call() -> None:
            self.callback(line)

        self.team.run_on_first(call)

    def _log_valid(self, epoch: int, figures: dict[str, float]) -> Line:
        line = {"kind": "valid", "step": self.step, "epoch": epoch, **figures}
        self.run.log(line)
        return line

    def _check_weights(self) -> None:
        """Refuses to save infinite or NaN weights: the loss shows a bad update only at the next step."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"the weights ({name}) became infinite or NaN by step {self.step} at {self._advice()}"
                )

    def _advice(self) -> str:
        c = self.config
        kept = "no state yet" if self.saved is None else f"the state saved after step {self.saved}"
        lower = "a lower lr or clip" if c.clip else "a lower lr or a clip above 0"
        return (
            f"lr={c.lr}, clip={c.clip}. Start anew with {lower}, by overwrite=True (--overwrite) or with "
            f"another out: resume=True (--resume) keeps both. {self.run.path} keeps {kept}"
        )

    def save(self) -> None:
        """Saves everything that later steps depend on."""
        self._check_weights()
        self.run.save_state(
            {
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "rate": self.rate,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "in_epoch": self.in_epoch.numbers(),
                "processes": self.team.gather(self._own_state()),
            }
        )
        self.saved = self.step

    def _own_state(self) -> dict[str, Any]:
        """The part of the state that differs between processes."""
        on_gpu = self.device.type == "cuda"
        return {
            "hidden": [tuple(state.cpu() for state in pair) for pair in self.get_hidden()],
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "since_line": self.since_line.numbers(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["processes"]) != self.team.size:
            raise ValueError(
                f"resume needs as many processes as the run in {self.run.path} was started with: "
                f"{len(state['processes'])}, not {self.team.size}"
            )
        own = state["processes"][self.team.rank]
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.rate, self.saved = state["rate"], self.step
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._place_rates()
        self.set_hidden([(h.to(self.device), c.to(self.device)) for h, c in own["hidden"]])
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda" and own["cuda_random"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(own["cuda_random"], self.device)
        self.since_line, self.in_epoch = Sums(*own["since_line"]), Sums(*state["in_epoch"])
        self.run.keep_lines(state["metric_lines"])
