"""What a run gives back and `load` opens: a language model or a classifier with its tokenizer and
configuration.
"""

import abc
import contextlib
import math
import numbers
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .batches import IGNORE, evaluation_windows, pad_batch
from .classifier import TextClassifier
from .config import ClassifierConfig, FinetuneConfig, ModelConfig, PretrainConfig
from .corpus import Label, Labels, Sources, check_known, check_labels, check_one_length, read_texts
from .devices import pick_device
from .history import perplexity
from .model import AWDLSTM, LanguageModel
from .ops._common import as_int
from .runs import TOKENIZER, as_directory, load_weights, read_config, read_history
from .text import PAD_ID, UNK_ID, Tokenizer, check_text, check_texts

Probabilities = NDArray[np.float32]
_Model = TypeVar("_Model", bound=nn.Module)
_Config = TypeVar("_Config")


def build_lm(sizes: ModelConfig, vocab_size: int, dropouts: dict[str, float]) -> LanguageModel:
    """A LanguageModel with fresh weights. sizes: ModelConfig; dropouts: the five probabilities."""
    return LanguageModel(build_encoder(sizes, vocab_size, dropouts), output_p=dropouts["output_p"])


def build_encoder(sizes: ModelConfig, vocab_size: int, dropouts: dict[str, float]) -> AWDLSTM:
    inner: dict[str, Any] = {name: dropouts[name] for name in ("hidden_p", "input_p", "embed_p", "weight_p")}
    return AWDLSTM(vocab_size, sizes.emb_sz, sizes.n_hid, sizes.n_layers, pad_token=PAD_ID, **inner)


def build_classifier(
    sizes: ModelConfig, vocab_size: int, n_classes: int, config: ClassifierConfig
) -> TextClassifier:
    """A TextClassifier with fresh weights, as a ClassifierConfig describes it."""
    dropouts = config.dropouts()
    hidden = [config.head_hidden] if config.head_hidden else []
    return TextClassifier(
        build_encoder(sizes, vocab_size, dropouts),
        n_classes,
        config.bptt,
        config.max_len,
        lin_ftrs=hidden,
        ps=[dropouts["output_p"]] + [config.head_p] * len(hidden),
    )


class _Result(Generic[_Model, _Config]):
    """What TrainedLM and TrainedClassifier share.

    Args:
        model: put into eval mode.
        tokenizer: the run's.
        config: the stage's dataclass.
        path: the run directory, made absolute; None: there is none.
        history: all lines of metrics.jsonl.
    """

    def __init__(
        self,
        model: _Model,
        tokenizer: Tokenizer,
        config: _Config,
        path: str | pathlib.Path | None = None,
        history: Iterable[dict[str, Any]] = (),
    ) -> None:
        self.model: _Model = model.eval()
        self.tokenizer, self.config = tokenizer, config
        self.path = None if path is None else pathlib.Path(path).absolute()  # also after os.chdir
        self.history = list(history)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def backwards(self) -> bool:
        """Whether the model reads each text from its end to its beginning."""
        return self.tokenizer.backwards

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures of the last epoch: of training, means over all of it, under dropout, while the weights
        changed; of validation, with "valid_" before their names.
        """
        last = {line["kind"]: line for line in self.history}
        trained = last.get(
            "epoch", last.get("train", {})
        )  # runs of earlier versions have no line of an epoch
        figures = {k: v for k, v in trained.items() if k != "kind"}
        figures.update(
            {
                f"valid_{k}": v
                for k, v in last.get("valid", {}).items()
                if k in ("loss", "perplexity", "accuracy")
            }
        )
        return figures

    def __repr__(self) -> str:
        way = "backwards, " if self.backwards else ""
        words = len(self.tokenizer)
        return f"{type(self).__name__}({str(self.path)!r}, {words} words, {way}on {self.device})"


class TrainedLM(_Result[LanguageModel, PretrainConfig | FinetuneConfig]):
    """A language model of stage 1 or 2."""

    def perplexity(self, texts: Sources, batch_size: int = 16) -> float:
        """exp of the mean cross-entropy per token of `texts`, read as one stream with xxbos before each text;
        inf where that is larger than a float.

        A backward model reads the texts in their order too, but each from its end to its xxbos, and predicts
        each token from those to its right.

        No dropout; state is carried from window to window, beginning with zeros; every token but the very
        first is scored once. Words outside the vocabulary count as xxunk, so perplexities of models with
        different vocabularies do not compare.

        Args:
            texts: as the `sources` of pretrain_lm, texts or paths.
            batch_size: columns in which the stream is read, each beginning with zero state: 1 gives the
                figure of an unbroken reading, more columns nearly the same one sooner.
        """
        batch_size = _count("batch_size", batch_size, 1)
        docs = self.tokenizer.encode(read_texts(texts))
        return perplexity(stream_loss(self.model, docs, batch_size, self.config.bptt))

    def generate(
        self, prompt: str = "", n: int = 40, temperature: float = 1.0, seed: int | None = None
    ) -> str:
        """`prompt`, as the tokenizer reads it, continued by `n` tokens, as text.

        Words of the prompt outside the vocabulary appear as xxunk. Markers count as tokens; xxbos becomes a
        line break.

        A backward model reads the prompt as the end of a text, from its last word to its first, and continues
        to the left: the new words stand before the prompt, and all in the normal order. Its first new token
        may be a marker, which then applies to the prompt's first word ("film" becomes "Film").

        Args:
            prompt: the text to continue; "" begins a new one.
            n: tokens to add.
            temperature: 0 takes the most likely token each time, 1 draws from the model's distribution.
            seed: of the drawn tokens; None draws from torch's default generator.

        xxunk and xxpad are never drawn.
        """
        check_text(prompt, "prompt")
        n = _count("n", n, 0)
        if not (isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
        if seed is not None and as_int(seed) is None:
            raise TypeError(f"seed must be None or an int, got {seed!r}")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be None or at least -2**63 and below 2**64, got {seed!r}")
        generator = None if seed is None else torch.Generator().manual_seed(as_int(seed))
        ids = self.tokenizer.encode([prompt])[0].tolist()
        if self.backwards:  # xxbos stands between two texts in this direction too: it comes before the first
            ids = ids[-1:] + ids[:-1]  # word that is read, and behind the last it would end the text
        encoder, decoder = self.model[0], self.model[1]
        feed, hidden = ids, encoder.zero_hidden(1)
        with _evaluating(self.model):
            for _ in range(n):
                outputs, hidden = encoder.run(torch.tensor([feed], device=self.device), hidden)
                logits = decoder(outputs[-1][:, -1:])[0, 0].double().cpu()
                logits[[UNK_ID, PAD_ID]] = -math.inf
                feed = [_draw(logits, float(temperature), generator)]
                ids += feed
        return self.tokenizer.decode(ids)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    """An index drawn from the softmax of logits / temperature; the most likely one at 0."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature  # the largest is 0: a tiny temperature overflows to -inf
    return int(torch.multinomial(scaled.softmax(0), 1, generator=generator))


def stream_loss(
    model: LanguageModel,
    docs: Sequence[np.ndarray],
    batch_size: int,
    bptt: int,
    between: Callable[[], object] | None = None,
) -> float:
    """Mean cross-entropy in nats per token of a LanguageModel over arrays of indices; leaves its mode and its
    carried state as they were. between: called after each batch; what it raises ends the measurement.
    """
    device, encoder, decoder = next(model.parameters()).device, model[0], model[1]
    hidden, total, count = encoder.zero_hidden(0), 0.0, 0
    with _evaluating(model):
        for ids, targets in evaluation_windows(docs, batch_size, bptt):
            outputs, hidden = encoder.run(ids.to(device), hidden)
            if n := int((targets != IGNORE).sum()):
                mean, _ = decoder(outputs[-1], targets.to(device), IGNORE)
                total, count = total + float(mean.double()) * n, count + n
            if between:
                between()
    return total / count


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; restores the mode of each module after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _count(name: str, value: Any, least: int) -> int:
    """`value` as an int; ValueError unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


class Predictor(abc.ABC):
    """What follows from `predict_proba` and `classes`, the classes in the order of its columns."""

    classes: list[Label]

    @abc.abstractmethod
    def predict_proba(self, texts: Iterable[str], batch_size: int = 64) -> Probabilities: ...

    def predict(self, texts: Iterable[str], batch_size: int = 64) -> list[Label]:
        """The most likely class of each text."""
        return [self.classes[i] for i in self.predict_proba(texts, batch_size).argmax(1)]

    def accuracy(self, texts: Iterable[str], labels: Labels, batch_size: int = 64) -> float:
        """Share of `texts` whose predicted class is their label; a label that is no class is an error."""
        texts, wanted = check_texts(texts), check_labels(labels)
        check_one_length(texts, wanted)
        check_known(wanted, self.classes)
        return float(np.mean([p == t for p, t in zip(self.predict(texts, batch_size), wanted, strict=True)]))


class TrainedClassifier(_Result[TextClassifier, ClassifierConfig], Predictor):
    """A classifier of stage 3; `classes` in the order of predict_proba's columns."""

    def __init__(
        self,
        model: TextClassifier,
        tokenizer: Tokenizer,
        config: ClassifierConfig,
        classes: Iterable[Label],
        path: str | pathlib.Path | None = None,
        history: Iterable[dict[str, Any]] = (),
    ) -> None:
        super().__init__(model, tokenizer, config, path, history)
        self.classes = list(classes)

    def predict_proba(self, texts: Iterable[str], batch_size: int = 64) -> Probabilities:
        """float32 (len(texts), len(classes)): probabilities in the order of `texts`."""
        batch_size = _count("batch_size", batch_size, 1)
        docs = self.tokenizer.encode(check_texts(texts, allow_empty=True))
        return document_logits(self.model, docs, len(self.classes), batch_size).softmax(1).numpy()


def document_logits(
    model: TextClassifier,
    docs: Sequence[np.ndarray],
    n_classes: int,
    batch_size: int,
    between: Callable[[], object] | None = None,
) -> Tensor:
    """float32 (len(docs), n_classes) on the CPU, in the order of `docs`; leaves the model's mode as it
    was. between: as in stream_loss.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(docs)), key=lambda i: len(docs[i]))  # like lengths together: little padding
    logits = torch.zeros(len(docs), n_classes, dtype=torch.float32, device="cpu")
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, lengths = pad_batch([docs[i] for i in chosen])
            logits[chosen] = model(ids.to(device), lengths.to(device)).float().cpu()
            if between:
                between()
    return logits


def load(
    run_dir: str | pathlib.Path, device: str | torch.device | None = None
) -> TrainedLM | TrainedClassifier:
    """Opens a run directory: TrainedLM for stages 1 and 2, TrainedClassifier for stage 3.

    An unfinished run gives the weights of its last whole epoch. device: None is CUDA where it can be used,
    else the CPU. FileNotFoundError where there is no run, or no epoch of it has ended; ValueError for a
    damaged file.
    """
    path, device = as_directory(run_dir, "run_dir"), pick_device(device)
    record = read_config(path)
    config, classes = record["config"], record["classes"]
    tokenizer = Tokenizer.load(path / TOKENIZER, record["backwards"])
    if record["stage"] == "classify":
        classifier = build_classifier(record["model"], len(tokenizer), len(classes), config)
        load_weights(classifier, path)
        return TrainedClassifier(classifier.to(device), tokenizer, config, classes, path, read_history(path))
    lm = build_lm(record["model"], len(tokenizer), config.dropouts())
    load_weights(lm, path)
    return TrainedLM(lm.to(device), tokenizer, config, path, read_history(path))
