"""What a run gives back and `load` opens: a language model or a classifier with its tokenizer and
configuration.
"""

import math

import numpy as np
import torch

from .batches import IGNORE, evaluation_windows, pad_batch
from .classifier import TextClassifier
from .corpus import check_labels
from .devices import pick_device
from .model import AWDLSTM, LanguageModel
from .runs import TOKENIZER, as_directory, load_weights, read_config, read_history
from .text import PAD_ID, UNK_ID, Tokenizer, check_texts


def build_lm(sizes, vocab_size, dropouts):
    """A LanguageModel with fresh weights. sizes: ModelConfig; dropouts: the five probabilities."""
    return LanguageModel(build_encoder(sizes, vocab_size, dropouts), output_p=dropouts["output_p"])


def build_encoder(sizes, vocab_size, dropouts):
    inner = {name: dropouts[name] for name in ("hidden_p", "input_p", "embed_p", "weight_p")}
    return AWDLSTM(vocab_size, sizes.emb_sz, sizes.n_hid, sizes.n_layers, pad_token=PAD_ID, **inner)


def build_classifier(sizes, vocab_size, n_classes, config):
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


class _Result:
    """model (in eval mode), tokenizer, config (the stage's dataclass), path, history (all lines of
    metrics.jsonl).
    """

    def __init__(self, model, tokenizer, config, path=None, history=()):
        self.model, self.tokenizer, self.config, self.path = model.eval(), tokenizer, config, path
        self.history = list(history)

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def metrics(self):
        """The last figures of training, and of validation with "valid_" before their names."""
        last = {line["kind"]: line for line in self.history}
        figures = {k: v for k, v in last.get("train", {}).items() if k != "kind"}
        figures.update(
            {
                f"valid_{k}": v
                for k, v in last.get("valid", {}).items()
                if k in ("loss", "perplexity", "accuracy")
            }
        )
        return figures

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.tokenizer)} words, on {self.device})"


class TrainedLM(_Result):
    """A language model of stage 1 or 2."""

    def perplexity(self, texts, batch_size=16):
        """exp of the mean cross-entropy per token of `texts`, read as one stream with xxbos before each text.

        No dropout; state is carried from window to window, beginning with zeros; every token but the very
        first is scored once. The stream is read in `batch_size` columns, each beginning with zero state:
        batch_size=1 gives the figure of an unbroken reading, more columns nearly the same one sooner. Words
        outside the vocabulary count as xxunk, so perplexities of models with different vocabularies do not
        compare.
        """
        docs = self.tokenizer.encode(check_texts(texts))
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        return math.exp(stream_loss(self.model, docs, batch_size, self.config.bptt))

    @torch.no_grad()
    def generate(self, prompt="", n=40, temperature=1.0, seed=None):
        """`prompt` continued by `n` tokens, as text.

        temperature: 0 takes the likeliest token each time, 1 draws from the model's distribution. seed: None
        draws from torch's default generator. xxunk and xxpad are never drawn.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be str, got {type(prompt).__name__}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n must be an integer of at least 0, got {n!r}")
        if not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ids = self.tokenizer.encode([prompt])[0].tolist()
        self.model.reset()
        feed = ids
        for _ in range(n):
            logits = self.model(torch.tensor([feed], device=self.device))[0, -1].double().cpu()
            logits[[UNK_ID, PAD_ID]] = -math.inf
            if temperature == 0:
                choice = int(logits.argmax())
            else:
                choice = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
            ids.append(choice)
            feed = [choice]
        self.model.reset()
        return self.tokenizer.decode(ids)


@torch.no_grad()
def stream_loss(model, docs, batch_size, bptt):
    """Mean cross-entropy in nats per token of a LanguageModel over arrays of indices; leaves the mode as it
    was.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    model.reset()
    total, count = 0.0, 0
    for ids, targets in evaluation_windows(docs, batch_size, bptt):
        n = int((targets != IGNORE).sum())
        if n:
            total += float(model(ids.to(device), targets.to(device), ignore_index=IGNORE)[1].double()) * n
            count += n
    model.reset()
    model.train(was_training)
    return total / count


class TrainedClassifier(_Result):
    """A classifier of stage 3; `classes` in the order of predict_proba's columns."""

    def __init__(self, model, tokenizer, config, classes, path=None, history=()):
        super().__init__(model, tokenizer, config, path, history)
        self.classes = list(classes)

    def predict_proba(self, texts, batch_size=64):
        """float32 (len(texts), len(classes)): probabilities in the order of `texts`."""
        docs = self.tokenizer.encode(check_texts(texts, allow_empty=True))
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        return document_logits(self.model, docs, len(self.classes), batch_size).softmax(1).numpy()

    def predict(self, texts, batch_size=64):
        """The likeliest class of each text."""
        return [self.classes[i] for i in self.predict_proba(texts, batch_size).argmax(1)]

    def accuracy(self, texts, labels, batch_size=64):
        """Share of `texts` whose predicted class is their label."""
        texts, labels = check_texts(texts), check_labels(labels)
        if len(texts) != len(labels):
            raise ValueError(f"texts and labels must have one length, got {len(texts)} and {len(labels)}")
        return float(np.mean([p == t for p, t in zip(self.predict(texts, batch_size), labels, strict=True)]))


@torch.no_grad()
def document_logits(model, docs, n_classes, batch_size):
    """float32 (len(docs), n_classes) on the CPU, in the order of `docs`; leaves the model's mode as it
    was.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(docs)), key=lambda i: len(docs[i]))  # like lengths together: little padding
    logits = torch.zeros(len(docs), n_classes)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, lengths = pad_batch([docs[i] for i in chosen])
        logits[chosen] = model(ids.to(device), lengths.to(device)).float().cpu()
    model.train(was_training)
    return logits


def load(run_dir, device=None):
    """Opens a run directory: TrainedLM for stages 1 and 2, TrainedClassifier for stage 3."""
    path = as_directory(run_dir, "run_dir")
    record = read_config(path)
    config, classes = record["config"], record["classes"]
    tokenizer = Tokenizer.load(path / TOKENIZER)
    if record["stage"] == "classify":
        model = build_classifier(record["model"], len(tokenizer), len(classes), config)
    else:
        model = build_lm(record["model"], len(tokenizer), config.dropouts())
    load_weights(model, path)
    model.to(pick_device(device))
    if record["stage"] == "classify":
        return TrainedClassifier(model, tokenizer, config, classes, path, read_history(path))
    return TrainedLM(model, tokenizer, config, path, read_history(path))
