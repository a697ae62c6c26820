"""A whole training step of three libraries: ours, stock torch modules wired as fastai wires them, and fastai.

All three start from the same weights, read the same tokens with the same dropout probabilities, and end with
torch's clipping and fused AdamW, as `ulmfit_fast.loop.Loop` does it: bf16 is autocast over float32 weights,
and so is fp16, with a gradient scaler.
That favours fastai, whose own optimizer is slower, and whose learner, callbacks and, for the classifier,
regularisation of the activations are left out.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from ulmfit_fast.batches import pad_batch
from ulmfit_fast.config import make_config
from ulmfit_fast.results import build_classifier, build_lm
from ulmfit_fast.stock import StockLanguageModel

from .quality_fastai import import_fastai
from .stock_classifier import StockClassifier, pad_chunks

CLASSES = 6
ERROR_STEPS = 8  # time steps of the gradient check
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """task: "lm" or "classifier"; bptt: time steps, of the classifier those of a chunk."""

    task: str
    preset: str
    batch: int
    bptt: int
    vocab: int
    device: str = "cpu"

    @property
    def sizes(self):
        return make_config("pretrain", self.preset).model_config()

    @property
    def config(self):
        return make_config("pretrain" if self.task == "lm" else "classify", self.preset, {"bptt": self.bptt})

    @property
    def lengths(self):
        """Tokens of each document, longest first: evenly spread over a quarter of a chunk to two chunks."""
        longest, shortest = 2 * self.bptt, max(1, self.bptt // 4)
        return torch.linspace(longest, shortest, self.batch).round().long().tolist()

    @property
    def tokens(self):
        return self.batch * self.bptt if self.task == "lm" else sum(self.lengths)

    def draw_ids(self, *shape):
        """Token numbers as frequent as Zipf's law has them, without xxunk and xxpad (0 and 1)."""
        ids = 1 + torch.rand(shape).mul(math.log(self.vocab - 1)).exp().long().clamp(max=self.vocab - 2)
        return ids.to(self.device)


class Step:
    """One library's model, its optimizer, and one batch. loss() is the forward pass.

    carrier: the module whose `hidden` a language model carries from step to step.
    """

    def __init__(self, model, loss, config, device, carrier=None):
        self.model, self.loss, self.clip = model.train(), loss, config.clip
        # a scale so low that no first step overflows: a step that is skipped would look fast
        self.device, self.scaler = device, torch.amp.GradScaler(device, init_scale=2.0**12)
        self.carrier, self.hidden = carrier, {}
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, precision, mark):
        """The clock's marks around one step. Each precision goes on from the state that it left itself."""
        if self.carrier and precision in self.hidden:
            self.carrier.hidden = self.hidden[precision]
        elif self.carrier:
            self.model.reset()
        begin = mark()
        self.take(precision)
        end = mark()
        if self.carrier:
            self.hidden[precision] = self.carrier.hidden
        return begin, end

    def take(self, precision):
        """One step; -> its loss."""
        loss = self.backward(precision)
        if precision == "fp16":
            self.scaler.unscale_(self.optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if precision == "fp16":
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return loss

    def backward(self, precision):
        """Leaves the gradients, fp16's times the scaler's scale; -> the loss."""
        kind = AUTOCAST.get(precision, torch.bfloat16)
        with torch.autocast(self.device, kind, enabled=precision in AUTOCAST):
            loss = self.loss()
        self.optimizer.zero_grad()
        (self.scaler.scale(loss) if precision == "fp16" else loss).backward()
        return loss.detach()

    def make_optimizer_state(self):
        """What every later step finds: the gradients of the step before it, and Adam's moments."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()


def build(case, library, dropout=True):
    """The Step of `library`: "ours", "torch" or "fastai". Without dropout its gradients can be compared."""
    torch.manual_seed(0)
    return (_lm if case.task == "lm" else _classifier)(case, library, dropout)


def have_fastai():
    try:
        import_fastai()
    except ImportError:
        return False
    return True


def _dropouts(config, dropout):
    return {name: p if dropout else 0.0 for name, p in config.dropouts().items()}


def _lm(case, library, dropout):
    config = case.config
    drops = _dropouts(config, dropout)
    ours = build_lm(case.sizes, case.vocab, drops).to(case.device)
    text = case.draw_ids(case.batch, case.bptt + 1)
    ids, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    regularise = {"alpha": config.alpha, "beta": config.beta}
    if library == "fastai":
        model, loss = _fastai_lm(case, drops, ours, ids, targets, **regularise)
    else:
        model = ours if library == "ours" else StockLanguageModel.like(ours, **drops)
        loss = lambda: model(ids, targets, **regularise)[0]  # noqa: E731
    return Step(model, loss, config, case.device, carrier=model if library == "torch" else model[0])


def _fastai_lm(case, drops, ours, ids, targets, alpha, beta):
    """fastai's model, and the loss that its learner makes with RNNCallback and RNNRegularizer."""
    ft = import_fastai()
    from fastai.text.models.awdlstm import awd_lstm_lm_config

    config = awd_lstm_lm_config | dataclasses.asdict(case.sizes) | drops
    model = ft.get_language_model(ft.AWD_LSTM, case.vocab, config).to(case.device)
    _load(model, ours)
    cross_entropy = ft.CrossEntropyLossFlat()

    def loss():
        logits, raw, dropped = model(ids)
        entropy = cross_entropy(logits.float(), targets)  # to float32 as fastai's MixedPrecision does
        total = entropy + alpha * dropped.float().pow(2).mean()
        return total + beta * (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()

    return model, loss


def _classifier(case, library, dropout):
    """All layers train, as in the last epochs of gradual unfreezing."""
    config = case.config
    drops = _dropouts(config, dropout)
    if not dropout:
        config = config.replace(**drops, head_p=0.0)
    ours = build_classifier(case.sizes, case.vocab, CLASSES, config).to(case.device)
    docs = [case.draw_ids(n) for n in case.lengths]
    wanted = torch.randint(CLASSES, (case.batch,)).to(case.device)
    if library == "ours":
        ids, lengths = pad_batch([np.asarray(d.cpu()) for d in docs])  # lengths stay on the host
        ids = ids.to(case.device)
        return Step(ours, lambda: F.cross_entropy(ours(ids, lengths).float(), wanted), config, case.device)
    ids = pad_chunks(docs, case.bptt)
    if library == "torch":
        model = StockClassifier.like(ours, **drops).to(case.device)
        return Step(model, lambda: F.cross_entropy(model(ids).float(), wanted), config, case.device)
    ft = import_fastai()
    from fastai.text.models.awdlstm import awd_lstm_clas_config

    model = ft.get_text_classifier(
        ft.AWD_LSTM,
        case.vocab,
        CLASSES,
        seq_len=case.bptt,
        config=awd_lstm_clas_config | dataclasses.asdict(case.sizes) | drops,
        lin_ftrs=[config.head_hidden],
        ps=[config.head_p],
        max_len=config.max_len,
    ).to(case.device)
    _load(model, ours)
    cross_entropy = ft.CrossEntropyLossFlat()
    return Step(model, lambda: cross_entropy(model(ids)[0].float(), wanted), config, case.device)


def _load(model, ours):
    """Our weights into a fastai model, parameter by parameter in order: names in its head differ."""
    for theirs, mine in zip(model.parameters(), ours.parameters(), strict=True):
        if theirs.shape != mine.shape:
            raise ValueError(
                f"a parameter of fastai's model is {tuple(theirs.shape)}, ours {tuple(mine.shape)}"
            )
        theirs.data.copy_(mine.data)


def memory_call(spec):
    """One step, for memory.peak. spec: (Case, harness.Side whose run is not set)."""
    case, side = spec
    step = build(case, side.package)
    step.make_optimizer_state()

    def call():
        with side.settings():
            step.run(side.precision, time.perf_counter)

    return call


def gradient_errors(case, sides):
    """{side name: largest relative error of a parameter's gradient} of the language model, against float64.

    None for a side that failed. Nothing is dropped, as the libraries' masks differ, and the window is
    ERROR_STEPS long, so that float64 is done in seconds; batch and sizes are the case's.
    """
    case = dataclasses.replace(case, bptt=min(case.bptt, ERROR_STEPS))

    @cache
    def truth():
        exact = build(case, "torch", dropout=False)
        exact.model.double()
        exact.backward("fp64")
        return _gradients(exact.model)

    def error(side):
        step = build(case, side.package, dropout=False)
        step.backward(side.precision)
        found = _gradients(step.model)
        scale = step.scaler.get_scale() if side.precision == "fp16" else 1.0
        return max(float((found[n].double() / scale - g).norm() / g.norm()) for n, g in truth().items())

    return {side.name: side.attempt(partial(error, side)) for side in sides}


def _gradients(model):
    """{name in our language model: gradient}. The stock model's names lack the encoder's and decoder's."""
    ours = {"embedding.weight": "0.encoder.weight", "bias": "1.decoder.bias"}
    named = ((ours.get(n, n), p.grad) for n, p in model.named_parameters())
    return {n if n[0].isdecimal() else f"0.{n}": gradient for n, gradient in named}
