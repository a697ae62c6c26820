"""Text classifier: reads documents in chunks (BPT3C), pools over all of them, and a small head decides."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import ops, to_torch
from .devices import to_device
from .encoder import AWDLSTM, is_exporting
from .ops._common import check_probability, check_size
from .stack import Stack, unique_groups

# Token budget per chunk (64 documents x 72 steps) where chunk borders cannot affect results. Weights are
# repacked for every chunk, so fewer chunks are cheaper. Longer chunks of 64 documents were slower: they no
# longer fitted into the caches.
_CHUNK_TOKENS = 64 * 72


class SentenceEncoder(nn.Module):
    """Reads whole documents through an encoder and pools: ids (B, T), lengths (B,) -> (B, 3 * emb_sz).

    BPT3C (Howard and Ruder 2018): a document is read in chunks, each from the previous one's final state,
    and the result is [last, max, mean] of the outputs at all its tokens.  Gradients flow through the last
    max_len tokens of each document (all of them if None), across the borders of its chunks, which fastai
    cuts; earlier tokens are read and pooled without gradient, so that memory is bounded by max_len whatever
    the length.  Chunks have bptt tokens with bidir, whose reverse direction begins anew in each; otherwise
    their borders change no number, and where the batch is small they are longer, for speed.

    Chunks are counted from each document's end, so a document joins the batch in the chunk where it begins;
    inside, the longest comes first.  Tokens at and beyond a length are never read, and the result of a
    document depends neither on them nor on its neighbours.  The dropout masks are drawn once and hold for the
    whole of each document, as variational dropout has it (fastai draws them anew for each chunk).  The
    encoder's carried state is neither used nor changed.

    Args:
        module: the encoder.
        bptt: the length of a chunk in tokens.  It does not truncate back-propagation; max_len does.
        max_len: tokens at the end of each document through which gradients flow; None: all of them.

    Under torch.compile and torch.export the values of lengths are not known: every document takes part in
    every chunk, and a wrong length is a RuntimeError.  One graph serves all widths, but with bidir, whose
    chunks are counted, one width each.  An exported program sends gradients through all tokens.
    """

    def __init__(self, module: AWDLSTM, bptt: int = 72, max_len: int | None = 1440) -> None:
        super().__init__()
        if bptt <= 0:
            raise ValueError(f"bptt must be greater than zero, got {bptt}")
        if max_len is not None and max_len <= 0:
            raise ValueError(f"max_len must be None or greater than zero, got {max_len}")
        self.module = module
        self.bptt = bptt
        self.max_len = max_len

    def reset(self) -> None:
        """Forget the encoder's state."""
        self.module.reset()

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads and pools the documents.

        Args:
            ids: (B, T) int64 or int32 token numbers; what is at and beyond a length is not read.
            lengths: (B,) int64 or int32 in 0..T, in any order; None for T each.  Best on the host, where they
                are needed.

        Returns:
            (B, 3 * emb_sz); zeros for a document of length 0.

        Raises:
            ValueError: ids or lengths are not what is said above (RuntimeError for the value of a length
                under torch.compile).
        """
        lengths = _check_documents(ids, lengths)
        longest_first = torch.argsort(lengths, descending=True, stable=True)
        counts = None if torch.compiler.is_compiling() else lengths[longest_first].tolist()
        rows = to_device(longest_first, ids.device)
        pooled = self._read(ids, rows, to_device(lengths[longest_first], ids.device), counts)
        missing = ids.size(0) - pooled.size(0)
        if missing:
            pooled = torch.cat([pooled, pooled.new_zeros(missing, pooled.size(1))])
        return pooled[torch.argsort(rows)]

    if TYPE_CHECKING:
        __call__ = forward

    def _read(self, ids: Tensor, rows: Tensor, lengths: Tensor, counts: list[int] | None) -> Tensor:
        """Pooled features of the documents that have tokens; lengths and counts are those of ids[rows].

        A graph must not depend on lengths' values: there counts is None, and all documents are in all chunks.
        """
        encoder = self.module
        hidden = encoder.zero_hidden(0)
        seed = encoder.draw_seed()
        pool = _RunningPool(hidden[-1][0].new_zeros(0, encoder.emb_sz))
        chunks = self._graph_chunks(ids) if counts is None else self._chunks(counts)
        for far, near in chunks:
            active = ids.size(0) if counts is None else sum(count > near for count in counts)
            length = lengths[:active]
            start = (length - far).clamp(min=0)
            valid = (length.clamp(max=far) - near).clamp(min=0)
            steps = torch.arange(far - near, device=ids.device)
            position = torch.minimum(start[:, None] + steps, length[:, None] - 1).clamp(min=0)
            with_grad = torch.is_grad_enabled() and (self.max_len is None or near < self.max_len)
            with torch.set_grad_enabled(with_grad):
                chunk = ids[rows[:active, None], position]
                outputs, hidden = encoder.run(chunk, hidden, lengths=valid, seed=seed)
                pool.add(outputs[-1], valid)
        return pool.result(lengths[: pool.total.size(0)])

    def _chunks(self, counts: list[int]) -> list[tuple[int, int]]:
        """(far, near) distances from a document's end, far to near; where it may matter one is max_len.

        counts: tokens of each document, the longest first.
        """
        longest = counts[0] if counts else 0
        cut = self.max_len if torch.is_grad_enabled() or self.module.n_dir == 2 else None
        chunks, near = [], 0
        while near < longest:
            border = cut if cut is not None and near < cut < longest else longest
            far = near + self._chunk_steps(border - near, sum(count > near for count in counts))
            chunks.append((far, near))
            near = far
        return chunks[::-1]

    def _chunk_steps(self, distance: int, documents: int) -> int:
        """Time steps of the nearest chunk where `distance` is cut into as few as allowed, about equal."""
        if self.module.n_dir == 2:
            return min(distance, self.bptt)
        chunks = -(-distance // max(self.bptt, _CHUNK_TOKENS // documents))
        return -(-distance // chunks)

    def _graph_chunks(self, ids: Tensor) -> list[tuple[int, int]]:
        """`_chunks` for documents as long as ids are wide, as few of them as give the same numbers.

        The reverse direction alone depends on the borders, and gradients on that of max_len.
        """
        longest = ids.size(1)
        if self.module.n_dir == 2:
            return self._chunks([longest])
        cut = self.max_len if torch.is_grad_enabled() and not is_exporting() else None
        if cut is not None and longest > cut:
            return [(longest, cut), (cut, 0)]
        return [(longest, 0)]


class _RunningPool:
    """[last, max, mean] over chunks; sums in fp32 or better.  Each chunk's rows extend the previous one's."""

    def __init__(self, empty: Tensor) -> None:
        self.last = self.largest = empty
        self.total = empty.to(torch.promote_types(empty.dtype, torch.float32))

    def add(self, out: Tensor, lengths: Tensor) -> None:
        """out (B, T, H), of which row b has lengths[b] valid steps; 0 only in its first chunks or in all."""
        self.last, largest, mean = ops.concat_pool(out, lengths).chunk(3, dim=1)
        largest = largest.masked_fill(lengths[:, None] == 0, -torch.inf)
        total = mean.to(self.total.dtype) * lengths[:, None]
        old = self.total.size(0)
        self.total = torch.cat([self.total + total[:old], total[old:]])
        self.largest = torch.cat([torch.maximum(self.largest.to(out.dtype), largest[:old]), largest[old:]])

    def result(self, lengths: Tensor) -> Tensor:
        lengths = lengths[:, None]
        mean = (self.total / lengths.clamp(min=1)).to(self.last.dtype)
        return torch.cat([self.last, self.largest.masked_fill(lengths == 0, 0), mean], 1)


def _check_documents(ids: Tensor, lengths: Tensor | None) -> Tensor:
    """lengths as an int64 tensor, checked against ids: on the host, but in a graph where they are."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be (B, T) int64 token numbers, got {tuple(ids.shape)} of {ids.dtype}")
    batch, steps = ids.shape
    if lengths is None:
        return torch.full((batch,), steps, device="cpu")
    if not isinstance(lengths, Tensor):  # torch's default device would move one
        lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"lengths must be ({batch},) int64, one for each row of ids, "
            f"got shape {tuple(lengths.shape)} of {lengths.dtype}"
        )
    if torch.compiler.is_compiling():
        in_range = ((lengths >= 0) & (lengths <= steps)).all()
        torch._assert_async(in_range, "lengths must be in 0..T, the width of ids")
        return lengths.long()
    lengths = lengths.cpu()
    wrong = [n for n in lengths.tolist() if not 0 <= n <= steps]
    if wrong:
        raise ValueError(f"lengths must be in 0..{steps} (the width of ids), got {wrong[0]}")
    return lengths.long()


class BatchNorm1d(nn.BatchNorm1d):
    """Batch norm that in training normalises a batch of fewer than two rows by its running statistics.

    One document has no variance to normalise by; `nn.BatchNorm1d` raises there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.size(0) < 2 and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class PoolingLinearClassifier(nn.Module):
    """Batch norm, dropout, linear without bias, once or more, ReLU between: (B, dims[0]) -> (B, dims[-1])."""

    def __init__(
        self,
        dims: Sequence[int],
        ps: Sequence[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(ps) != len(dims) - 1:
            raise ValueError(
                f"ps must have one dropout for each of {len(dims) - 1} linear layers, got {list(ps)}"
            )
        blocks = []
        for i, p in enumerate(ps):
            norm = BatchNorm1d(dims[i], **factory)
            nn.init.constant_(norm.bias, 1e-3)  # fastai's
            dropout = nn.Dropout(check_probability("TextClassifier", "ps", p))
            block = [norm, dropout, nn.Linear(dims[i], dims[i + 1], bias=False, **factory)]
            blocks.append(nn.Sequential(*block, *([nn.ReLU()] if i < len(ps) - 1 else [])))
        self.layers = nn.Sequential(*blocks)

    def reset_parameters(self) -> None:
        """Fresh weights and statistics."""
        block: Any  # a Sequential does not say what it holds
        for block in self.layers:
            norm, _, linear, *_ = block
            norm.reset_parameters()
            nn.init.constant_(norm.bias, 1e-3)
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    if TYPE_CHECKING:
        __call__ = forward


class TextClassifier(Stack[SentenceEncoder, PoolingLinearClassifier]):
    """Documents to classes: model[0] the `SentenceEncoder` over `encoder`, model[1] the head, as in fastai.

    The head is made on the device and in the dtype of the encoder.

    Args:
        encoder: the AWDLSTM, held and trained, not copied.
        n_classes: the number of classes, that of the logits.
        bptt: the length of a chunk in tokens, see `SentenceEncoder`; it does not truncate back-propagation.
        max_len: tokens at the end of each document through which gradients flow; None: all of them.
        lin_ftrs: the widths of the head's hidden layers.
        ps: the head's dropout probabilities, in [0, 1): one before each linear layer; the first drops pooled
            features.

    Raises:
        ValueError, TypeError: an argument is not what is said above.
    """

    def __init__(
        self,
        encoder: AWDLSTM,
        n_classes: int,
        bptt: int = 72,
        max_len: int | None = 1440,
        lin_ftrs: Sequence[int] = (50,),
        ps: Sequence[float] = (0.4, 0.1),
    ) -> None:
        n_classes = check_size("n_classes", n_classes)
        weight, dims = encoder.encoder.weight, [3 * encoder.emb_sz, *lin_ftrs, n_classes]
        head = PoolingLinearClassifier(dims, ps, weight.device, weight.dtype)
        super().__init__(SentenceEncoder(encoder, bptt, max_len), head)

    @classmethod
    def from_language_model(
        cls, lm: nn.Sequential, n_classes: int, *, dropout: dict[str, float] | None = None, **options: Any
    ) -> "TextClassifier":
        """A classifier on a copy of a language model's encoder, with a fresh head.

        Args:
            lm: a `LanguageModel`; it is left as it is.
            n_classes: as of the class.
            dropout: arguments of `AWDLSTM.set_dropout`; None keeps the probabilities of `lm`.
            **options: bptt, max_len, lin_ftrs and ps, as of the class.
        """
        encoder = next(lm.children(), None) if isinstance(lm, nn.Sequential) else None
        if not isinstance(encoder, AWDLSTM):
            raise TypeError(f"lm must be a LanguageModel (that of a TrainedLM is its model), got {lm!r:.100}")
        encoder = copy.deepcopy(encoder)
        encoder.bs = 1
        encoder.reset()
        encoder.set_dropout(**(dropout or {}))
        return cls(encoder, n_classes, **options)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, n_classes) of ids (B, T) and lengths (B,), as `SentenceEncoder.forward` takes them."""
        return self[1](self[0](ids, lengths))

    if TYPE_CHECKING:
        __call__ = forward

    def reset(self) -> None:
        """Forget the encoder's state."""
        self[0].reset()

    def to_torch(self) -> fx.GraphModule:
        """The same classifier in stock torch modules alone, in eval: stock(ids, lengths) -> logits.

        As `AWDLSTM.to_torch`.  lengths must be given, on the device of ids, and ids have a time step.
        Documents are read whole, so memory grows with their length.
        """
        return to_torch.to_torch(self, to_torch.TextClassifier(self))

    def layer_groups(self) -> list[list[nn.Parameter]]:
        encoder = self[0].module
        return unique_groups([[encoder.encoder], *([rnn] for rnn in encoder.rnns), [self[1]]])
