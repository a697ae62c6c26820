"""The one training loop of all three stages: phases, schedules, logging, saving, stopping and going on."""

import contextlib
import math
import signal
import threading
import time

import torch

from . import schedules
from .graphed import GraphedStep
from .progress import Progress


class Loop:
    """Trains `model` and leaves everything in a run directory.

    groups: lists of parameters, first layer group to last.      plan: list of schedules.Phase.
    batches(epoch): a sequence of the epoch's batches, a function of the epoch alone.
    loss_of(batch): (loss to minimise, {name: detached mean over the batch}, tokens in the batch).
    validate(): figures of the validation set; validate_first measures them before the first step too.
    before_epoch(): called before an epoch's first step.         hidden: get/set of state carried between
    steps.
    """

    def __init__(
        self,
        model,
        groups,
        plan,
        config,
        run,
        *,
        batches,
        loss_of,
        validate=None,
        validate_first=False,
        before_epoch=None,
        get_hidden=list,
        set_hidden=lambda hidden: None,
        title="",
        progress=None,
        callback=None,
    ):
        self.model, self.groups, self.plan, self.config, self.run = model, groups, plan, config, run
        self.batches, self.loss_of, self.validate = batches, loss_of, validate
        self.validate_first = validate_first
        self.before_epoch = before_epoch or (lambda: None)
        self.get_hidden, self.set_hidden = get_hidden, set_hidden
        self.title, self.progress, self.callback = title, progress, callback
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
        self.take_step = self._take_step
        if graphed:
            self.take_step = GraphedStep(self._take_step, self.device, self.get_hidden, self.set_hidden)
        self._place_rates()
        self.epochs = sum(phase.epochs for phase in plan)
        self.epoch = self.batch = self.step = 0
        self.between_steps = True
        self.n_trainable = None
        self._forget_sums()

    def train(self, state=None):
        """Runs to the end from `state` (what `run.begin` gave back) or from the beginning.

        Ctrl-C ends the step under way, saves the state and raises KeyboardInterrupt; so does a
        KeyboardInterrupt raised by `callback(line)`, which is called with a metrics line after each logged
        step.
        """
        self.model.train()
        if state is not None:
            self._restore(state)
        elif self.validate_first:
            self._validate(epoch=0)
        with _DelayedInterrupt() as self.interrupt:
            self.bar = None
            try:
                while self.epoch < self.epochs:
                    self._train_epoch()
                self.run.plot()
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
        self.run.finish(self.model)

    def _train_epoch(self):
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
            if line and self.callback:
                self.callback(line)
            self.interrupt.check()
        valid = self._validate(self.epoch + 1)
        self.bar.epoch(self.epoch + 1, self.epochs, self.last_line, valid)
        self.epoch, self.batch = self.epoch + 1, 0
        if self.epoch < self.epochs:
            self.save()
            self.run.save_model(self.model)
        self.interrupt.check()

    def _phase(self):
        """(first epoch, phase) of the present epoch. The rate has a schedule of its own in each phase."""
        first = 0
        for phase in self.plan:
            if self.epoch < first + phase.epochs:
                return first, phase
            first += phase.epochs
        raise IndexError(self.epoch)

    def _freeze(self, n_trainable):
        for position, group in enumerate(self.groups):
            for parameter in group:
                parameter.requires_grad_(position >= len(self.groups) - n_trainable)
        if isinstance(self.take_step, GraphedStep) and n_trainable != self.n_trainable:
            self.take_step.forget()
        self.n_trainable = n_trainable

    def _set_rate(self, t, steps):
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

    def _place_rates(self):
        """Learning rates lie on the device where a graph has to find new ones there, else on the host."""
        for group in self.optimizer.param_groups:
            rate = float(group["lr"])
            graphed = isinstance(self.take_step, GraphedStep)
            group["lr"] = torch.tensor(rate, device=self.device) if graphed else rate

    def _take_step(self, batch):
        """One update. Nothing here waits for the device, or a graph could not hold it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss, figures, tokens = self.loss_of(batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip:
            trainable = [p for group in self.groups for p in group if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trainable, self.config.clip)
        self.optimizer.step()
        return {name: value.detach() for name, value in figures.items()}, tokens

    def _account(self, batch):
        start = time.perf_counter()
        figures, tokens = self.take_step(batch)
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
        self.count += 1
        self.tokens += tokens
        self.seconds += time.perf_counter() - start

    def _log(self):
        start = time.perf_counter()
        means = {name: float(total) / self.count for name, total in self.sums.items()}  # waits for the device
        self.seconds += time.perf_counter() - start
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss became {means['loss']} before step {self.step} at lr={self.config.lr}; "
                f"a lower lr or clip helps. {self.run.path} keeps the last saved state"
            )
        if "accuracy" not in means:
            means["perplexity"] = math.exp(min(means["loss"], 700))
        speed = self.tokens / max(self.seconds, 1e-9)
        self.last_line = {
            "kind": "train",
            "step": self.step,
            "epoch": self.epoch + 1,
            **means,
            "lr": self.rate,
            "tokens_per_s": round(speed, 1),
        }
        self.run.log(self.last_line)
        self._forget_sums()
        return self.last_line

    def _forget_sums(self):
        """Sums since the last logged line; a logged figure is the mean over the steps since then."""
        self.sums, self.count, self.tokens, self.seconds = {}, 0, 0, 0.0

    def _validate(self, epoch):
        if self.validate is None:
            return None
        line = {"kind": "valid", "step": self.step, "epoch": epoch, **self.validate()}
        self.run.log(line)
        return line

    def save(self):
        """All that decides the numbers of later steps."""
        self.run.save_state(
            {
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "fingerprint": self.run.fingerprint,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "hidden": [tuple(pair) for pair in self.get_hidden()],
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "sums": {name: float(total) for name, total in self.sums.items()},
                "counts": (self.count, self.tokens, self.seconds),
                "last_line": getattr(self, "last_line", None),
            }
        )

    def _restore(self, state):
        if state["fingerprint"] != self.run.fingerprint:
            raise ValueError(
                f"resume needs the texts and labels the run in {self.run.path} was started with; "
                "these are others"
            )
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._place_rates()
        self.set_hidden([(h.to(self.device), c.to(self.device)) for h, c in state["hidden"]])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["cuda_random"] is not None:  # None: saved on a CPU
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        self.sums = {
            name: torch.tensor(v, dtype=torch.float64, device=self.device)
            for name, v in state["sums"].items()
        }
        self.count, self.tokens, self.seconds = state["counts"]
        self.last_line = state["last_line"]
        self.run.keep_lines(state["metric_lines"])


class _DelayedInterrupt(contextlib.AbstractContextManager):
    """Lets a first Ctrl-C wait for `check`, so that a step is never torn; a second one acts at once.

    Signals reach the main thread alone: elsewhere this does nothing.
    """

    def __enter__(self):
        self.pending = False
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.before = signal.signal(signal.SIGINT, self._receive)
        return self

    def _receive(self, number, frame):
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True

    def check(self):
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def __exit__(self, *error):
        if self.active:
            signal.signal(signal.SIGINT, self.before)
