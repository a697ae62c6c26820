"""fastai's text classifier on stock torch modules, as `ulmfit_fast.stock` has its language model."""

import torch
import torch.nn.functional as F
from torch import nn

from ulmfit_fast.classifier import PoolingLinearClassifier
from ulmfit_fast.stock import StockLSTM, dropout_mask
from ulmfit_fast.text import PAD_ID


def pad_chunks(docs, bptt):
    """ids (B, T) of documents, longest first, padded as fastai's Pad_Chunk does it.

    Whole chunks of xxpad stand before a document, the rest behind it: each begins where a chunk does.
    """
    longest = max(map(len, docs))
    rows = []
    for doc in docs:
        before = (longest - len(doc)) // bptt * bptt
        rows.append(F.pad(doc, (before, longest - len(doc) - before), value=PAD_ID))
    return torch.stack(rows)


class StockClassifier(nn.Module):
    """ids (B, T) as `pad_chunks` makes them -> logits (B, classes). The head is ours, plain torch."""

    def __init__(self, embedding, sizes, head, bptt, *, output_p, hidden_p, input_p, embed_p, weight_p):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding.clone(), freeze=False, padding_idx=PAD_ID)
        self.rnns = nn.ModuleList([StockLSTM(n_in, n_out, weight_p) for n_in, n_out in sizes])
        self.head, self.bptt = head, bptt
        self.hidden_p, self.input_p, self.embed_p = hidden_p, input_p, embed_p

    @classmethod
    def like(cls, classifier, **dropouts):
        """The stock twin of a TextClassifier, with its weights."""
        reader, head = classifier
        encoder = reader.module
        weights = [rnn.module.weight_ih_l0 for rnn in encoder.rnns]
        sizes = [(w.shape[1], w.shape[0] // 4) for w in weights]
        blocks = [[m for m in block if isinstance(m, nn.Dropout | nn.Linear)] for block in head.layers]
        dims = [blocks[0][1].in_features, *(linear.out_features for _, linear in blocks)]
        twin_head = PoolingLinearClassifier(dims, [dropout.p for dropout, _ in blocks])
        twin_head.load_state_dict(head.state_dict())
        twin = cls(encoder.encoder.weight.detach(), sizes, twin_head, reader.bptt, **dropouts)
        twin.rnns.load_state_dict(encoder.rnns.state_dict())
        return twin

    def forward(self, ids):
        batch, steps = ids.shape
        padded = ids == PAD_ID
        hidden, outputs = [None] * len(self.rnns), []
        for start in range(0, steps, self.bptt):
            chunk = ids[:, start : start + self.bptt]
            rows = int((chunk[:, 0] != PAD_ID).sum())  # the longest come first, so those that have begun do
            output, hidden = self._encode(chunk[:rows], hidden)
            outputs.append(F.pad(output, (0, 0, 0, 0, 0, batch - rows)))
        return self.head(self._pool(torch.cat(outputs, 1), padded))

    def _encode(self, ids, hidden):
        weight = self.embedding.weight
        if self.training and self.embed_p:
            weight = weight * dropout_mask(weight, (len(weight), 1), self.embed_p)
        x = self._drop(F.embedding(ids, weight, PAD_ID), self.input_p)
        states = []
        for layer, rnn in enumerate(self.rnns):
            x, state = rnn(x, _with_rows(hidden[layer], len(ids)))
            states.append(tuple(s.detach() for s in state))
            if layer < len(self.rnns) - 1:
                x = self._drop(x, self.hidden_p)
        return x, states

    def _drop(self, x, p):
        return x * dropout_mask(x, (x.shape[0], 1, x.shape[2]), p) if self.training and p else x

    def _pool(self, out, padded):
        """[last, largest, mean] over the tokens of each document."""
        lengths = (~padded).sum(1)
        mean = out.masked_fill(padded[:, :, None], 0).sum(1) / lengths[:, None].to(out.dtype)
        largest = out.masked_fill(padded[:, :, None], -float("inf")).amax(1)
        last = out.shape[1] - 1 - padded[:, -self.bptt :].sum(1)
        return torch.cat([out[torch.arange(len(out), device=out.device), last], largest, mean], 1)


def _with_rows(state, rows):
    """Zeros for the documents that begin in this chunk."""
    return None if state is None else tuple(F.pad(s, (0, 0, 0, rows - s.shape[1])) for s in state)
