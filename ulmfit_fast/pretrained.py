"""Weights from elsewhere as models of this library, and models of this library as files that others load."""

import dataclasses
import functools
import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import archives
from .checkpoints import atomic_write, load_state, read_model, save_model
from .classifier import TextClassifier
from .encoder import AWDLSTM
from .foreign import FORMATS, Parts, parse, transfer
from .model import LanguageModel
from .runs import MODEL, TOKENIZER, read_config
from .text import PAD, PAD_ID, Tokenizer, check_texts, own_names
from .unpickling import LEGACY_MAGIC, ZIP_MAGIC, Inert, module_state, read_tokens, read_torch

_COPYING_S = 60  # two files of one model may be that far apart after both were copied
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights under fastai 2's names, which are this library's own, and what came with them.

    Args:
        source: the file or URL.
        format: whose it was: "ulmfit_fast", "fastai 2", "fastai 1", "fastai 0.7", "salesforce" or "torch".
        state: of a language model, a classifier or an encoder, on the CPU.
        tokens: the word of each row of the embedding, or None where the file has none.
        notes: what was missing, left out or unusual.
        known: after `with_tokens`, how many of the words were known.
        backwards: whether the model reads texts from their ends, where the file says it (a run directory or a
            file of `save_checkpoint`); else None.
    """

    source: str
    format: str
    state: dict[str, Tensor] = field(repr=False)
    tokens: list[str] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    known: int | None = None
    backwards: bool | None = None

    def __post_init__(self) -> None:
        rows = self.parts.embedding
        if self.tokens is not None and not all(isinstance(token, str) for token in self.tokens):
            raise ValueError(f"{self.source} comes with tokens that are not str")
        if self.tokens is not None and (rows is None or len(self.tokens) != len(rows)):
            words = "no embedding" if rows is None else f"an embedding of {len(rows):,}"
            raise ValueError(f"{self.source} comes with {len(self.tokens):,} words, but {words}")
        if self.backwards is not None and not isinstance(self.backwards, bool):
            raise ValueError(f"{self.source} says backwards={self.backwards!r}; true and false are allowed")

    @functools.cached_property
    def parts(self) -> Parts:
        """The weights without names, for use in models other than this library's."""
        return parse(self.state, self.source)

    @property
    def direction(self) -> bool | None:
        """`backwards`, or where the file does not say it True if its name does ("wt103-bwd.tgz")."""
        return True if self.backwards is None and names_backwards(self.source) else self.backwards

    @property
    def kind(self) -> str:
        """ "language model", "classifier" or "encoder"."""
        parts = self.parts
        return "classifier" if parts.head else "encoder" if parts.decoder is None else "language model"

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `AWDLSTM` that fix its shape: vocab_sz, emb_sz, n_hid, n_layers, bidir.

        They are read off the weights; ValueError where no AWDLSTM has these shapes.
        """
        return self.parts.config(self.source)

    def with_tokens(self, tokens: Sequence[str]) -> "Checkpoint":
        """The same weights for another vocabulary, by fastai's rule.

        A known word keeps its row of the embedding and its bias, an unknown one begins with the mean of all
        old rows and biases; of a word that occurs twice in the old list the last row counts.
        """
        if self.tokens is None:
            raise ValueError(f"{self.source} does not say its words: load_checkpoint(..., tokens=) does")
        state, known = transfer(self.state, self.tokens, tokens)
        return dataclasses.replace(self, state=state, tokens=list(tokens), known=known)

    def with_bias(self) -> "Checkpoint":
        """The same with zeros for the bias of a decoder that has none."""
        return dataclasses.replace(self, state=self.parts.with_bias().named("fastai"))

    def encoder(self, **dropouts: float) -> AWDLSTM:
        """An AWDLSTM with these weights. dropouts: its hidden_p, input_p, embed_p, weight_p."""
        options: dict[str, Any] = dropouts
        encoder = AWDLSTM(**self.config, pad_token=self._pad_token(), **options)
        bare = dataclasses.replace(self.parts, decoder=None, bias=None, head={})
        load_state(encoder, bare.named("fastai"), self.source)
        return encoder

    def _pad_token(self) -> int | None:
        """The row that gets no gradient: none in a model that has no such word."""
        if self.tokens is not None:
            words = own_names(self.tokens)
            return words.index(PAD) if PAD in words else None
        rows = 0 if self.parts.embedding is None else len(self.parts.embedding)
        return PAD_ID if self.format not in ("salesforce", "torch") and rows > PAD_ID else None

    def language_model(self, output_p: float = 0.1, **dropouts: float) -> LanguageModel:
        """A LanguageModel with these weights; its decoder is tied to the embedding where they are equal.

        It has no bias where the file's has none.
        """
        parts = self.parts
        if parts.decoder is None:
            raise ValueError(f"{self.source} holds no decoder; it is of kind {self.kind!r}")
        encoder = self.encoder(**dropouts)
        model = LanguageModel(encoder, output_p, tie_weights=parts.tied, bias=parts.bias is not None)
        load_state(model, dataclasses.replace(parts, head={}).named("fastai"), self.source)
        return model

    def classifier(
        self, n_classes: int | None = None, *, dropouts: Mapping[str, float] | None = None, **options: Any
    ) -> TextClassifier:
        """A TextClassifier on this encoder, with the file's head, or a fresh one of n_classes.

        options: of `TextClassifier`; dropouts: of the encoder.
        """
        parts = self.parts
        if not parts.head:
            if n_classes is None:
                raise ValueError(f"{self.source} has no classifier head: say n_classes for a fresh one")
            return TextClassifier(self.encoder(**(dropouts or {})), n_classes, **options)
        widths = [t.shape[0] for key, t in sorted(parts.head.items()) if key.endswith(".2.weight")]
        if n_classes not in (None, widths[-1]):
            raise ValueError(f"{self.source} has a head of {widths[-1]} classes, not n_classes={n_classes}")
        options = {"lin_ftrs": widths[:-1], "ps": [0.4] + [0.1] * (len(widths) - 1), **options}
        model = TextClassifier(self.encoder(**(dropouts or {})), widths[-1], **options)
        load_state(model, parts.named("fastai"), self.source)
        return model


def load_checkpoint(path: str | Path, tokens: Sequence[str] | str | Path | None = None) -> Checkpoint:
    """The weights at a path or URL, whoever wrote them. No code of a file ever runs.

    Args:
        path: a run directory; a safetensors file; a torch file of fastai 2 or 1 (language model, classifier
            or encoder, with or without optimizer), of fastai 0.7 (named .h5), of salesforce/awd-lstm-lm (the
            pickled [model, criterion, optimizer], or a state dict), of stock nn.LSTMs; a published archive
            such as wt103-fwd.tgz with its words. A str that begins with http://, https:// or file:// is
            fetched first (`archives.local_copy`).
        tokens: the words, or the path of their pickle (itos_wt103.pkl), where they are not in the file
            itself; None looks for NAME_itos.pkl beside NAME.pth, which `save_checkpoint` writes.

    Returns:
        Checkpoint, whose methods build the models.

    Raises:
        OSError: the file cannot be read or fetched.
        ValueError: the file is damaged, unsafe, or not a whole AWD-LSTM; the message names it.
    """
    source = str(path)
    path = archives.local_copy(source) if archives.is_address(source) else Path(path)
    if isinstance(tokens, str | Path):
        tokens = read_tokens(Path(tokens).read_bytes(), str(tokens))
    found: list[str] | None
    notes: list[str] = []
    if path.is_dir():
        backwards = read_config(path, "path")["backwards"]
        origin, state, _ = _read_safetensors(path / MODEL)
        found = Tokenizer.load(path / TOKENIZER).itos
    else:
        origin, state, metadata = _read_file(path, source, notes)
        found, backwards = metadata.get("tokens"), metadata.get("backwards")
    parts = parse(state, source)
    if tokens is None and found is None:
        found = _words_beside(path, parts.embedding, notes)
    tokens = found if tokens is None else list(tokens)
    notes = parts.notes + notes
    origin, state = origin or parts.origin, parts.named("fastai")
    return Checkpoint(source, origin, state, tokens, tuple(notes), backwards=backwards)


def _words_beside(path: Path, embedding: Tensor | None, notes: list[str]) -> list[str] | None:
    """The words of NAME_itos.pkl beside NAME.pth, if they are the embedding's; notes says if they are not, or
    may not be.
    """
    beside = _beside(path)
    if embedding is None or not beside.is_file():
        return None
    try:
        words = read_tokens(beside.read_bytes(), beside.name)
        if len(words) == len(embedding):
            if path.stat().st_mtime - beside.stat().st_mtime > _COPYING_S:
                notes.append(
                    f"{beside.name}, beside it, is older than {path.name}: are its words this model's?"
                )
            return words
        notes.append(f"{beside.name}, beside it, is not taken: {len(words)} words for {len(embedding)} rows")
    except ValueError as error:
        notes.append(f"{beside.name}, beside it, is not taken: {error}")
    return None


def _beside(path: Path) -> Path:
    return path.with_name(path.stem + "_itos.pkl")


def _read_file(
    path: Path, source: str, notes: list[str]
) -> tuple[str | None, Mapping[str, Tensor], dict[str, Any]]:
    """(format if the file says it, state dict, what it says besides: tokens, backwards); notes gets what is
    left out.
    """
    archives.check_published_name(path)
    with open(path, "rb") as file:
        begin = file.read(len(LEGACY_MAGIC))
    if begin.startswith(archives.GZIP_MAGIC):
        found = archives.read_archive(path)
        state = _torch_state(found["weights"][1], f"{source}: {found['weights'][0]}", notes)
        words = found.get("tokens")
        return None, state, {"tokens": words and read_tokens(words[1], f"{source}: {words[0]}")}
    if begin.startswith(ZIP_MAGIC) or begin == LEGACY_MAGIC:
        return None, _torch_state(path.read_bytes(), source, notes), {}
    if begin.startswith(_HDF5_MAGIC):
        raise ValueError(f"{source} is an HDF5 file; fastai's .h5 files are torch files under that name")
    if begin[8:9] != b"{":
        raise ValueError(f"{source} is no torch file, no safetensors file and no gzipped archive")
    return _read_safetensors(path)


def _read_safetensors(path: Path) -> tuple[str | None, Mapping[str, Tensor], dict[str, Any]]:
    state, metadata = read_model(path)
    state = {key: state[key] for key in sorted(state, reverse=True)}  # its order says nothing: bias_ih first
    ours = any("encoder_dp." in key for key in state)
    return "ulmfit_fast" if ours else None, state, metadata


def _torch_state(data: bytes, source: str, notes: list[str]) -> Mapping[str, Tensor]:
    content = read_torch(data, source)
    if isinstance(content, list | tuple) and content and isinstance(content[0], Inert):
        # salesforce's [model, criterion, optimizer]
        criterion = [module_state(each) for each in content[1:2] if isinstance(each, Inert)]
        if left := {key: tuple(tensor.shape) for each in criterion for key, tensor in each.items()}:
            notes.append(
                f"left out: the criterion's {', '.join(f'{key} {shape}' for key, shape in left.items())}; it "
                "was trained with a softmax in two stages, and its language model has a plain one"
            )
        content = content[0]
    if isinstance(content, Inert):
        return module_state(content)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]  # fastai's {"model", "opt"}
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in content.items()
    ):
        raise ValueError(f"{source} must hold a state dict or a model, got {type(content).__name__}")
    return content


def names_backwards(source: str | Path) -> bool:
    """Whether a file is called as fastai calls those of backward models."""
    return "bwd" in archives.file_name(str(source)).lower()


def save_checkpoint(
    path: str | Path, model: object, format: str = "ulmfit_fast", tokens: Sequence[str] | None = None
) -> None:
    """Write weights such that another program loads them; `load_checkpoint` reads all of them back.

    Files appear whole or not at all. The formats:

    - "ulmfit_fast": safetensors, with the words and, where it is known, the direction. The other formats have
      no place for the direction: a UserWarning says so if the file name implies the other one.
    - "fastai": what `learn.load`, `load_encoder` (an encoder) and `pretrained_fnames` take; the words go into
      NAME_itos.pkl beside NAME.pth. For a model whose decoder has no bias the config there needs
      out_bias=False.
    - "salesforce": the state dict of its RNNModel with weight drop; no classifier.
    - "torch": encoder.weight for an nn.Embedding, rnns.{l}.weight_ih_l0 and so on for an nn.ModuleList of
      nn.LSTMs, decoder.weight and .bias for an nn.Linear, head.{i}.0 and .2 for a classifier's BatchNorm1d
      and its nn.Linear without bias.

    Args:
        path: the file to write.
        model: a language model, a classifier or an encoder, of this library or with known keys, a Checkpoint,
            a TrainedLM or TrainedClassifier, or a state dict.
        format: one of the above.
        tokens: the words of the rows; None takes those of a Checkpoint, a TrainedLM or a TrainedClassifier.

    Raises:
        TypeError: `model` or `tokens` is not what is said above.
        ValueError: `format` is none of these, the model has no such form, or `tokens` has not one word for
            each row of the embedding.
    """
    if format not in ("ulmfit_fast", *FORMATS):
        raise ValueError(f"format must be one of ulmfit_fast, {', '.join(FORMATS)}, got {format!r}")
    if tokens is None:
        tokens = getattr(model, "tokens", None) or getattr(getattr(model, "tokenizer", None), "itos", None)
    backwards = getattr(model, "backwards", None)
    if isinstance(model, Checkpoint):
        state, backwards = model.state, model.direction
    else:
        model = model if isinstance(model, nn.Module) else getattr(model, "model", model)
        if not isinstance(model, nn.Module | Mapping):
            kinds = "a model, a Checkpoint, a TrainedLM or TrainedClassifier, or a state dict"
            raise TypeError(f"model must be {kinds}, got {model!r:.100}")
        state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    parts = parse({key: tensor.detach().cpu() for key, tensor in state.items()}, "model")
    if tokens is not None:
        tokens = [str(word) for word in check_texts(tokens, "tokens", allow_empty=True, what="words")]
    if tokens is not None and (parts.embedding is None or len(tokens) != len(parts.embedding)):
        raise ValueError(f"tokens must have one word for each row of the embedding, got {len(tokens)}")
    if format == "ulmfit_fast":
        said = {"tokens": tokens, "backwards": backwards}
        save_model(path, parts.named("fastai"), {k: v for k, v in said.items() if v is not None})
        return
    if backwards is not None and backwards != names_backwards(path):
        way, name = ("backwards", "with") if backwards else ("forwards", "without")
        warnings.warn(
            f"the model reads {way}, which this format cannot say: give a name {name} 'bwd' in it, "
            f"got path={str(path)!r}",
            stacklevel=2,
        )
    buffer = io.BytesIO()
    torch.save(parts.named(format), buffer)
    atomic_write(path, buffer.getvalue())
    if format == "fastai" and tokens is not None:
        atomic_write(_beside(Path(path)), pickle.dumps(tokens, protocol=2))
    elif format == "fastai" and _beside(Path(path)).exists():
        warnings.warn(
            f"{_beside(Path(path))} stays as it was, and will be taken for the words of {Path(path).name}: "
            "give tokens=..., or remove it",
            stacklevel=2,
        )
