"""The AWD-LSTM encoder, with fastai 2's attribute names and its state-dict keys in its order."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, fx, nn

from . import to_torch
from .layer import WeightDropLayer
from .nn import EmbeddingDropout, State, VariationalDropout
from .ops._common import Seed, as_int, check_probability, check_seed, check_size, derive_seed, draw_seed
from .ops._logits import is_hooked, is_plain

Hidden = list[State]  # per layer (h, c), each (directions, B, features of one direction)

# Which derived seed (see `derive_seed`) draws which mask of an encoder forward; then two for each layer:
# its WeightDropLSTM's and that of the dropout after it
_EMBEDDING, _INPUT, _FIRST_LAYER = 0, 1, 2


class AWDLSTM(nn.Module):
    """The AWD-LSTM encoder (Merity et al. 2017): embedding, then n_layers LSTMs, under dropouts.

    Args:
        vocab_sz: words, the rows of the embedding.
        emb_sz: features of the embedding and of the last layer's output.
        n_hid: features of the output of every other layer.
        n_layers: LSTM layers.
        pad_token: the row of the embedding that gets no gradient from the look-up, in [0, vocab_sz); None for
            no such row.
        hidden_p: variational dropout of the output of every layer but the last.
        input_p: variational dropout of the embedded words.
        embed_p: dropout of whole words, rows of the embedding.
        weight_p: DropConnect of the recurrent weights.  Each p is a probability in [0, 1); a fifth one, of
            the output, belongs to the decoder.
        bidir: read in both directions.  Each direction then has half of a layer's features, emb_sz // 2 in
            the last layer and n_hid // 2 in the others, so both sizes must be even.  Unlike in fastai the
            recurrent weights of the reverse direction are dropped too.

    The state of each call is carried, detached, into the next one: `hidden` is [(h, c)] per layer, `bs` its
    batch size, which may change between calls (rows beyond it start from zero, missing ones are forgotten).
    It follows the module's device and dtype and is no part of the state dict.

    Under torch.export and torch.jit.trace each call starts from zeros and nothing is carried, as a program
    has no place for it: export a module that calls `run` for a state that goes in and out.  torch.jit.trace
    wants torch.no_grad() around it, or check_trace=False: its check runs without gradients, where the ops
    save nothing and the graph differs.  torch.utils.checkpoint would repeat forward from a state that has
    moved on: an error, but not under torch.compile, which cannot see it.  `run` may be checkpointed.

    Raises:
        ValueError, TypeError: an argument is not what is said above.
    """

    def __init__(
        self,
        vocab_sz: int,
        emb_sz: int = 400,
        n_hid: int = 1152,
        n_layers: int = 3,
        pad_token: int | None = 1,
        hidden_p: float = 0.2,
        input_p: float = 0.6,
        embed_p: float = 0.1,
        weight_p: float = 0.5,
        bidir: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocab_sz": vocab_sz, "emb_sz": emb_sz, "n_hid": n_hid, "n_layers": n_layers}
        vocab_sz, emb_sz, n_hid, n_layers = (check_size(name, size) for name, size in sizes.items())
        pad, given = as_int(pad_token), pad_token is not None
        if given and (pad is None or not 0 <= pad < vocab_sz):
            raise ValueError(f"pad_token must be None or in [0, vocab_sz={vocab_sz}), got {pad_token!r}")
        pad_token = pad
        if bidir and (emb_sz % 2 or n_hid % 2):
            raise ValueError(f"bidir needs an even emb_sz and n_hid, got {emb_sz} and {n_hid}")
        self.emb_sz, self.n_hid, self.n_layers, self.pad_token = emb_sz, n_hid, n_layers, pad_token
        self.bs = 1
        self.n_dir = 2 if bidir else 1
        self.encoder = nn.Embedding(vocab_sz, emb_sz, padding_idx=pad_token, device=device, dtype=dtype)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        self.encoder_dp = EmbeddingDropout(self.encoder, embed_p)
        factory = {"device": device, "dtype": dtype}
        self.rnns = nn.ModuleList(self._layer(layer, bidir, weight_p, **factory) for layer in range(n_layers))
        self.input_dp = VariationalDropout(input_p)
        self.hidden_dps = nn.ModuleList(VariationalDropout(hidden_p) for _ in range(n_layers))
        self.hidden: Hidden = []
        self._carries = False  # whether `hidden` is what a call left
        self.reset()

    def reset_parameters(self) -> None:
        """Fresh weights, those of all modules within among them."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        rnn: Any  # a ModuleList does not say what it holds
        for rnn in self.rnns:
            rnn.reset_parameters()

    def _layer(self, layer: int, bidir: bool, weight_p: float, **factory: Any) -> nn.Module:
        n_in = self.n_hid if layer else self.emb_sz
        return WeightDropLayer(n_in, self._features(layer), bidir, weight_p, **factory)

    def _features(self, layer: int) -> int:
        return (self.n_hid if layer < self.n_layers - 1 else self.emb_sz) // self.n_dir

    def set_dropout(
        self,
        *,
        hidden_p: float | None = None,
        input_p: float | None = None,
        embed_p: float | None = None,
        weight_p: float | None = None,
    ) -> None:
        """Change the probabilities that are given (the language model and the classifier want others)."""
        dropout: Any
        rnn: Any
        if hidden_p is not None:
            for dropout in self.hidden_dps:
                dropout.p = check_probability("AWDLSTM", "hidden_p", hidden_p)
        if input_p is not None:
            self.input_dp.p = check_probability("AWDLSTM", "input_p", input_p)
        if embed_p is not None:
            self.encoder_dp.embed_p = check_probability("AWDLSTM", "embed_p", embed_p)
        if weight_p is not None:
            for rnn in self.rnns:
                rnn.weight_p = weight_p

    def reset(self) -> None:
        """Forget the state: the next call starts from zeros."""
        self.hidden, self._carries = self.zero_hidden(self.bs), False

    def zero_hidden(self, batch: int) -> Hidden:
        # not the weight's new_zeros: FSDP's weights are DTensors between forwards, and states must not be
        dtype, device = self.encoder.weight.dtype, self.encoder.weight.device

        def zeros(layer: int) -> Tensor:
            return torch.zeros((self.n_dir, batch, self._features(layer)), dtype=dtype, device=device)

        return [(zeros(layer), zeros(layer)) for layer in range(self.n_layers)]

    @overload
    def forward(
        self, inp: Tensor, from_embeds: bool = ..., lengths: Tensor | None = ...,
        return_raw: Literal[False] = ..., seed: Seed = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, inp: Tensor, from_embeds: bool = ..., lengths: Tensor | None = ...,
        *, return_raw: Literal[True], seed: Seed = ...,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
    @overload
    def forward(
        self, inp: Tensor, from_embeds: bool = ..., lengths: Tensor | None = ...,
        return_raw: bool = ..., seed: Seed = ...,
    ) -> Tensor | tuple[Tensor, list[Tensor]]: ...  # fmt: skip
    def forward(
        self,
        inp: Tensor,
        from_embeds: bool = False,
        lengths: Tensor | None = None,
        return_raw: bool = False,
        seed: Seed = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Read inp and carry the state into the next call.

        Args:
            inp: (B, T) token numbers, or (B, T, emb_sz) embeddings with from_embeds.
            from_embeds: whether inp is embeddings.
            lengths: int64 or int32 (B,), each in 0..T: steps beyond carry the state and give zeros.
            return_raw: whether to return every layer's output too.
            seed: of all dropout masks, as `run`; None draws one.

        Returns:
            output (B, T, emb_sz); with return_raw also the list of every layer's output before dropout (the
            last one is `output`: nothing drops it here).

        Raises:
            ValueError: inp has another shape.
            RuntimeError: the call is one that torch.utils.checkpoint repeats.
        """
        exporting = is_exporting() or torch.jit.is_tracing()
        if not exporting:
            self._refuse_recomputation()
        hidden = self.zero_hidden(inp.size(0)) if exporting else self.hidden
        raw_outputs, hidden = self.run(inp, hidden, from_embeds=from_embeds, lengths=lengths, seed=seed)
        if not exporting:
            self.bs = inp.size(0)
            self.hidden, self._carries = [(h.detach(), c.detach()) for h, c in hidden], True
        return (raw_outputs[-1], raw_outputs) if return_raw else raw_outputs[-1]

    if TYPE_CHECKING:
        __call__ = forward

    def _refuse_recomputation(self) -> None:
        """RuntimeError for a forward that begins with a carried state, with gradients, inside a backward."""
        if torch.compiler.is_compiling() or not (self._carries and torch.is_grad_enabled()):
            return
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "AWDLSTM.forward was called inside a backward pass, as torch.utils.checkpoint does to repeat "
                "it: it would start from the state that the first call left, and its gradients would be "
                "wrong. Checkpoint AWDLSTM.run instead, which takes the state and returns it, or a function "
                "that calls reset() first"
            )

    def run(
        self,
        inp: Tensor,
        hidden: Hidden,
        *,
        from_embeds: bool = False,
        lengths: Tensor | None = None,
        seed: Seed = None,
    ) -> tuple[list[Tensor], Hidden]:
        """`forward` as a function of the state; the module's own is neither read nor changed.

        Args:
            inp, from_embeds, lengths: as in `forward`.
            hidden: [(h, c)] per layer, each (directions, B, features of one direction).  It may have another
                batch size than inp: its first rows go on, further ones start from zeros.
            seed: of all dropout masks.  Calls with the same seed use the same masks, row for row, whatever
                the batch size.  None draws one where a dropout is active.

        Returns:
            every layer's output before dropout; the new state, laid out as `hidden`, attached to the graph.

        Raises:
            ValueError: inp has another shape.
        """
        if not isinstance(inp, Tensor):
            raise TypeError(f"inp must be a tensor, got {type(inp).__name__}")
        if inp.dim() != (3 if from_embeds else 2):
            raise ValueError(
                f"inp must be {'(B, T, emb_sz) embeddings' if from_embeds else '(B, T) token numbers'}, "
                f"got shape {tuple(inp.shape)}"
            )
        hidden = _resize_hidden(hidden, inp.size(0))
        seed = self.draw_seed() if seed is None else check_seed("AWDLSTM", seed)
        output = inp if from_embeds else _call(self.encoder_dp, inp, derive_seed(seed, _EMBEDDING))
        output = _call(self.input_dp, output, derive_seed(seed, _INPUT))
        raw_outputs, new_hidden = [], []
        for layer, (rnn, dropout) in enumerate(zip(self.rnns, self.hidden_dps, strict=True)):
            first = _FIRST_LAYER + 2 * layer
            hx = _usable(hidden[layer][0], output), _usable(hidden[layer][1], output)
            options: dict[str, Any] = {"lengths": lengths, "seed": derive_seed(seed, first)}
            dropped: list[Tensor] = []
            last = layer == self.n_layers - 1
            mask_seed = None if last else derive_seed(seed, first + 1)
            if not last and dropout.training and _may_fuse(rnn, dropout):
                options |= {"dropout_p": dropout.p, "dropout_seed": mask_seed}
            if isinstance(rnn, WeightDropLayer):
                output, state, *dropped = rnn(output, hx, **options)
            elif lengths is None:
                # contiguous, as cuDNN's LSTM takes no other
                output, state = rnn(output, (hx[0].contiguous(), hx[1].contiguous()))
            else:
                raise ValueError(f"lengths must be None where rnns[{layer}] is a {type(rnn).__name__}")
            raw_outputs.append(output)
            new_hidden.append(state)
            if not last:
                output = dropped[0] if dropped else _call(dropout, output, mask_seed)
        return raw_outputs, new_hidden

    def to_torch(self) -> fx.GraphModule:
        """The same encoder in stock torch modules alone, in eval: stock(ids, state) -> output, new state.

        It has copies of the weights, no dropout, and starts from zeros unless given a state, which is laid
        out as `hidden`.  Saved with torch.save it is loaded (weights_only=False, as it holds code) and run
        without this library.  `to_torch.torch_key` says how its keys relate to ours.
        """
        return to_torch.to_torch(self, to_torch.Encoder(self))

    def draw_seed(self) -> Tensor | None:
        """A seed for `run`, or None where no dropout is active."""
        if not self.training:
            return None
        dropouts = [(self.encoder_dp, "embed_p"), *((rnn, "weight_p") for rnn in self.rnns)]
        dropouts += [(dropout, "p") for dropout in (self.input_dp, *self.hidden_dps[:-1])]
        active = any((getattr(module, p, 0) or 0) > 0 for module, p in dropouts)  # a stand-in may have none
        return draw_seed(self.encoder.weight.device) if active else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AWDLSTM":
        super()._apply(fn, recurse)

        def moved(h: Tensor) -> Tensor:  # not fn(h), which to_empty() leaves unwritten
            return _like(h, fn(h.new_zeros(1)))

        self.hidden = [(moved(h), moved(c)) for h, c in self.hidden]
        return self


def _may_fuse(rnn: nn.Module, dropout: nn.Module) -> bool:
    """Whether the layer's kernel may drop its own output, which no hook of the two modules would see then."""
    if not (isinstance(rnn, WeightDropLayer) and is_plain(dropout, VariationalDropout)):
        return False
    return not is_hooked(rnn) and not is_hooked(rnn.module)


def _call(dropout: nn.Module, x: Tensor, seed: Seed) -> Tensor:
    """dropout(x), with the seed where it is one of this library's."""
    ours = isinstance(dropout, VariationalDropout | EmbeddingDropout)
    return dropout(x, seed=seed) if ours else dropout(x)


def is_exporting() -> bool:
    """torch.compiler.is_exporting(), which torch 2.10 and 2.11 also take for true in every torch.compile."""
    return torch.compiler._is_exporting_flag


def _resize_hidden(hidden: Hidden, batch: int) -> Hidden:
    """The state of `batch` rows: the first ones of `hidden`, then zeros."""

    def resize(h: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one graph for every batch size: no branch on which is larger
            return torch.cat([h, h.new_zeros(h.size(0), batch, h.size(2))], 1)[:, :batch]
        missing = batch - h.size(1)
        if missing <= 0:
            return h[:, :batch]
        return torch.cat([h, h.new_zeros(h.size(0), missing, h.size(2))], 1)

    return [(resize(h), resize(c)) for h, c in hidden]


def _like(h: Tensor, like: Tensor) -> Tensor:
    """A state in the dtype and on the device of `like`; zeros where it comes from the meta device."""
    if h.is_meta and not like.is_meta:
        return torch.zeros(h.shape, device=like.device, dtype=like.dtype)
    return h.to(device=like.device, dtype=like.dtype)


def _usable(h: Tensor, like: Tensor) -> Tensor:
    """A carried state for this call's device and dtype (autocast changes it), also out of inference mode."""
    h = _like(h, like)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return h
    return h.clone() if h.is_inference() else h
