"""Every hyper-parameter of the three stages: one frozen dataclass per stage, typos refused.

Where the values of the dataclasses and of the preset "ulmfit" are from:

- Howard and Ruder 2018 (arXiv 1801.06146): batch_size, lr, stlr with cut_frac and ratio, beta2, the beta1 of
  0.7 and the dropouts of stages 2 and 3, bptt of the language model, discriminative, gradual_unfreezing,
  head_hidden.
- Their scripts: the beta1 of 0.8 of stage 1; alpha and beta, which are also salesforce/awd-lstm-lm's.
- fastai 2: emb_sz, n_hid, n_layers, eps, weight_decay, the dropouts of stage 1 and its 12 epochs,
  head_epochs, max_vocab, the min_freq of 3; of the classifier bptt, max_len and head_p.
- This library: clip, the other epochs, the classifier's min_freq, all else; the presets "small" and "tiny".

Nothing here imports torch.
"""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import numpy as np

_Config = TypeVar("_Config", bound="_Checked")
Options = Mapping[str, Any]


def _f(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    below_one: bool = False,
) -> Any:
    """A dataclass field with its help line and its bounds: low and high inclusive; below_one is [0, 1)."""
    meta = dict(help=help, low=low, high=high, choices=choices, below_one=below_one)
    return field(default=default, metadata=meta)


def _same(cls: "type[_Checked]", name: str) -> Any:
    """The field `name` of the dataclass `cls` once more."""
    f = cls.__dataclass_fields__[name]
    return field(default=f.default, metadata=f.metadata)


def unknown_key_message(kind: str, key: object, valid: Iterable[str]) -> str:
    """'unknown option lrr; did you mean lr?' with all valid names after it."""
    near = difflib.get_close_matches(str(key), list(valid), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {key!r}{hint} Valid: {', '.join(sorted(valid))}"


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool of Python; TypeError unless it is one, or NumPy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


def _check_field(owner: "_Checked", f: dataclasses.Field[Any]) -> None:
    value, meta = getattr(owner, f.name), f.metadata
    where, wanted = f"{type(owner).__name__}.{f.name}", field_type(f)
    kinds: dict[type, type] = {int: numbers.Integral, float: numbers.Real, bool: np.bool_}
    if isinstance(value, kinds.get(wanted, wanted)) and not isinstance(value, bool):  # numpy's too
        value = wanted(value)
        object.__setattr__(owner, f.name, value)
    if type(value) is not wanted:
        raise TypeError(f"{where} must be {wanted.__name__}, got {value!r} ({type(value).__name__})")
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, meta['choices']))}, got {value!r}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value!r}")
    if meta["below_one"] and not 0 <= value < 1:
        what = "is a dropout probability and " if f.name.endswith("_p") else ""
        raise ValueError(f"{where} {what}must be in [0, 1), got {value!r}")
    if meta["low"] is not None and value < meta["low"]:
        raise ValueError(f"{where} must be at least {meta['low']}, got {value!r}")
    if meta["high"] is not None and value > meta["high"]:
        raise ValueError(f"{where} must be at most {meta['high']}, got {value!r}")


def field_type(f: dataclasses.Field[Any]) -> Any:
    """int, float, bool or str. Without `from __future__ import annotations` it is the type, not its name."""
    return f.type


@dataclass(frozen=True)
class _Checked:
    """Checks on construction, and conversion to and from plain dicts."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_field(self, f)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Raises ValueError for an unknown key, naming the nearest valid one."""
        valid = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in valid:
                raise ValueError(unknown_key_message(f"{cls.__name__} option", key, valid))
        return cls(**values)

    def replace(self: _Config, **changes: Any) -> _Config:
        """A copy with `changes`; an unknown name is an error."""
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """What fixes the shape of the encoder, and with it which checkpoints fit."""

    emb_sz: int = _f(400, "embedding size, also that of the last layer's output", low=1)
    n_hid: int = _f(1152, "hidden units of every layer but the last", low=1)
    n_layers: int = _f(3, "LSTM layers", low=1)


@dataclass(frozen=True)
class Stage(_Checked):
    """What all stages share."""

    epochs: int = _f(12, "epochs", low=1)
    batch_size: int = _f(64, "columns of the token stream that are read side by side", low=1)
    lr: float = _f(4e-3, "peak learning rate of the last layer group", low=0)
    schedule: str = _f("stlr", "learning rate over time", choices=("stlr", "one_cycle", "constant"))
    cut_frac: float = _f(0.1, "share of the steps in which the rate rises", low=0, high=1)
    ratio: float = _f(32.0, "peak rate over the lowest (stlr)", low=1)
    beta1: float = _f(0.8, "Adam's beta 1", below_one=True)
    beta2: float = _f(0.99, "Adam's beta 2", below_one=True)
    # a row without gradient, of a word that a classifier has not seen, is 0 / eps in float32: no eps, NaN
    eps: float = _f(1e-5, "Adam's epsilon", low=1e-30)
    weight_decay: float = _f(0.01, "decoupled weight decay", low=0)
    clip: float = _f(0.4, "largest norm of the gradient; 0: no clipping", low=0)
    output_p: float = _f(0.4, "dropout on the encoder's output", below_one=True)
    hidden_p: float = _f(0.3, "variational dropout between the layers", below_one=True)
    input_p: float = _f(0.4, "variational dropout on the embedded input", below_one=True)
    embed_p: float = _f(0.05, "dropout of whole embedding rows", below_one=True)
    weight_p: float = _f(0.5, "DropConnect on the hidden-to-hidden weights", below_one=True)
    drop_mult: float = _f(1.0, "multiplies the five dropouts above", low=0)
    precision: str = _f("fp32", "bf16: autocast over fp32 master weights", choices=("fp32", "bf16"))
    seed: int = _f(0, "random seed of initial weights, dropout masks and order", low=0, high=2**63 - 1)
    log_every: int = _f(10, "steps between two lines of metrics.jsonl", low=1)
    save_every: int = _f(500, "steps between saves of the training state; 0: only at epoch ends", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, p in self.dropouts().items():
            if p >= 1:
                raise ValueError(
                    f"{type(self).__name__}: {name}={getattr(self, name)} times drop_mult="
                    f"{self.drop_mult} is {p:g}; a dropout probability must stay below 1"
                )

    def dropouts(self) -> dict[str, float]:
        """The five probabilities with drop_mult applied."""
        names = ("output_p", "hidden_p", "input_p", "embed_p", "weight_p")
        return {name: getattr(self, name) * self.drop_mult for name in names}


@dataclass(frozen=True)
class _LanguageModelStage(Stage):
    """What the stages of the language model share."""

    bptt: int = _f(70, "tokens per truncated-BPTT window", low=1)
    alpha: float = _f(2.0, "activation regularisation (AR)", low=0)
    beta: float = _f(1.0, "temporal activation regularisation (TAR)", low=0)
    cuda_graph: bool = _f(False, "on a GPU: whole steps of bptt tokens from a CUDA graph")


@dataclass(frozen=True)
class PretrainConfig(_LanguageModelStage):
    """Stage 1: language model on general text."""

    emb_sz: int = _same(ModelConfig, "emb_sz")
    n_hid: int = _same(ModelConfig, "n_hid")
    n_layers: int = _same(ModelConfig, "n_layers")
    backwards: bool = _f(False, "read each text from its end to its beginning, here and in the later stages")
    max_vocab: int = _f(60000, "largest vocabulary, markers included", low=10)
    min_freq: int = _f(3, "a word seen less often becomes xxunk", low=1)

    def model_config(self) -> ModelConfig:
        return ModelConfig(self.emb_sz, self.n_hid, self.n_layers)


@dataclass(frozen=True)
class FinetuneConfig(_LanguageModelStage):
    """Stage 2: the language model on the target's text. `epochs` counts those after the head's own."""

    epochs: int = _f(12, "epochs in which all layers train, after those of head_epochs", low=1)
    head_epochs: int = _f(1, "epochs of embedding and decoder alone before all layers train", low=0)
    discriminative: float = _f(2.6, "rate of each layer group over that of the group below it", low=1)
    max_vocab: int = _f(60000, "most words taken from the target's text, markers included", low=10)
    min_freq: int = _f(3, "a word new to the base model and seen less often becomes xxunk", low=1)
    keep_base_vocab: bool = _f(True, "keep words of the base model that the target's text lacks")
    shuffle_texts: bool = _f(True, "a new order of the texts in each epoch")


@dataclass(frozen=True)
class ClassifierConfig(Stage):
    """Stage 3: the classifier."""

    epochs: int = _f(12, "epochs, those of gradual unfreezing included", low=1)
    batch_size: int = _f(64, "documents per batch", low=2)  # batch norm needs two
    gradual_unfreezing: bool = _f(True, "one more layer group per epoch, from the last; false: all at once")
    discriminative: float = _f(2.6, "rate of each layer group over that of the group below it", low=1)
    bptt: int = _f(72, "tokens per chunk of a document (BPT3C); more where the batch is small", low=1)
    max_len: int = _f(1440, "tokens at the end of a document through which gradients flow", low=1)
    head_hidden: int = _f(50, "hidden units of the head; 0: one linear layer", low=0)
    head_p: float = _f(0.1, "dropout before the head's last layer", below_one=True)
    label_smoothing: float = _f(0.0, "share of the target spread over all classes", below_one=True)
    max_vocab: int = _f(60000, "largest vocabulary (only from scratch)", low=10)
    min_freq: int = _f(2, "a word seen less often becomes xxunk (only from scratch)", low=1)


STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "classify": ClassifierConfig,
}

# Stage 1 sees much text once or a few times: fastai 2's dropouts for it; stages 2 and 3 take the paper's. The
# small presets have less capacity to regularise and far fewer steps, hence the lower drop_mult and the higher
# rates. Their stage 3 trains all layers at once at one rate: after little pre-training the lower layers must
# move. On 700 held-out training questions of TREC-6 (small, 7 epochs after stage 1, one seed) accuracy was
# .887 so, and .809 with rates a factor 2.6 apart.
_PRETRAIN_DROPS = dict(output_p=0.1, hidden_p=0.15, input_p=0.25, embed_p=0.02, weight_p=0.2)
_SMALL = dict(emb_sz=200, n_hid=576, n_layers=3, max_vocab=16000)
_TINY = dict(emb_sz=64, n_hid=128, n_layers=3, max_vocab=6000)
_ALL_AT_ONCE = dict(gradual_unfreezing=False, discriminative=1.0, lr=5e-3, clip=0.0)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "ulmfit": {
        "pretrain": dict(_PRETRAIN_DROPS, epochs=12),
        "finetune": dict(epochs=15, beta1=0.7),
        "classify": dict(epochs=15, batch_size=64, lr=1e-2, beta1=0.7, clip=0.0),
    },
    "small": {
        "pretrain": dict(_PRETRAIN_DROPS, **_SMALL, epochs=8, batch_size=32, lr=5e-3),
        "finetune": dict(epochs=8, batch_size=32, drop_mult=0.5, min_freq=2),
        "classify": dict(_ALL_AT_ONCE, epochs=12, batch_size=32, drop_mult=0.5),
    },
    "tiny": {
        "pretrain": dict(
            _PRETRAIN_DROPS, **_TINY, epochs=2, batch_size=16, bptt=48, lr=2e-2, drop_mult=0.3, min_freq=2
        ),
        "finetune": dict(epochs=3, batch_size=16, bptt=48, lr=1e-2, drop_mult=0.2, min_freq=2),
        "classify": dict(_ALL_AT_ONCE, epochs=6, batch_size=16, drop_mult=0.3),
    },
}


@overload
def make_config(
    stage: Literal["pretrain"], preset: str = ..., config: object = ..., overrides: Options | None = ...
) -> PretrainConfig: ...
@overload
def make_config(
    stage: Literal["finetune"], preset: str = ..., config: object = ..., overrides: Options | None = ...
) -> FinetuneConfig: ...
@overload
def make_config(
    stage: Literal["classify"], preset: str = ..., config: object = ..., overrides: Options | None = ...
) -> ClassifierConfig: ...
def make_config(
    stage: str, preset: str = "ulmfit", config: object = None, overrides: Options | None = None
) -> Stage:
    """The configuration of a stage: `config` over `preset`, `overrides` over both.

    Args:
        stage: "pretrain", "finetune" or "classify".
        preset: "ulmfit", "small" or "tiny".
        config: a dataclass of that stage, in place of the preset, or a dict over it.
        overrides: options by name.

    Returns:
        PretrainConfig, FinetuneConfig or ClassifierConfig.

    Raises:
        TypeError, ValueError: an option is unknown, or not what its field allows.
    """
    cls = STAGES[stage]
    if preset not in PRESETS:
        raise ValueError(unknown_key_message("preset", preset, PRESETS))
    if isinstance(config, cls):
        base = config
    elif config is None or isinstance(config, dict):
        base = cls.from_dict({**PRESETS[preset][stage], **(config or {})})
    else:
        raise TypeError(f"config must be a {cls.__name__} or a dict, got {type(config).__name__}")
    return base.replace(**(overrides or {}))
