"""What in fastai is a bug or a trap, seen to be one there, and what ours does: the same, or better."""

import copy
import pickle

import pytest
import torch
from checks_fastai import (
    BOTH,
    CLAS_CONFIG,
    LM_CONFIG,
    OURS,
    THEIRS,
    lm_learner,
    reviews,
    write_reviews,
)
from fastai.text.all import AWD_LSTM, get_language_model, get_text_classifier
from fastai.text.models.core import SentenceEncoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ulmfit_fast
from ulmfit_fast import fastai as uf

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")
V = 30


def language_model(arch, **options):
    torch.manual_seed(0)
    return get_language_model(arch, V, {**LM_CONFIG, **options})


def tokens(batch=4, steps=9, seed=0):
    return torch.randint(2, V, (batch, steps), generator=torch.Generator().manual_seed(seed))


class Calls(TorchDispatchMode):
    """The operators that are called, and whether one of them copies a weight of this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.copies = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape and not func.is_view:
            self.copies.append(str(func))
        return out


# ---- matched


@BOTH
def test_padding_row_is_not_zero_and_learns_where_tied(arch):
    model = language_model(arch)
    assert model[0].encoder.weight[1].abs().sum() > 0
    model(tokens())[0].logsumexp(-1).sum().backward()
    assert model[0].encoder.weight.grad[1].abs().sum() > 0


@BOTH
def test_only_whole_chunks_at_the_end_are_pooled(arch):
    """max_len 10 with chunks of 4 pools the last 8 of 20 tokens."""
    encoder = uf.SentenceEncoder(4, arch(V, 6, 10, 2), max_len=10).eval()
    out, mask = encoder(tokens(2, 20))
    assert out.shape == (2, 8, 6) and mask.shape == (2, 8)


@BOTH
def test_no_gradient_between_chunks(arch):
    """Ours where fastai's chunks are read; `ulmfit_fast.TextClassifier` lets it through."""
    encoder = uf.SentenceEncoder(4, arch(V, 6, 10, 2)).eval()
    x = torch.arange(2, 14)[None]  # every word once
    encoder(x)[0][0, -1].sum().backward()
    reached = encoder.module.encoder.weight.grad.abs().sum(1)[2:14] > 0
    assert reached.tolist() == [False] * 8 + [True] * 4
    ours = ulmfit_fast.TextClassifier(ulmfit_fast.AWDLSTM(V, 6, 10, 2), 2, bptt=4).eval()
    ours(x).sum().backward()
    assert (ours[0].module.encoder.weight.grad.abs().sum(1)[2:14] > 0).all()


@pytest.mark.filterwarnings("ignore")
def test_vocabularies_are_padded_with_xxfake(tmp_path):
    dls = reviews(write_reviews(tmp_path, train=4, test=2), is_lm=True)
    assert len(dls.vocab) % 8 == 0
    model = lm_learner(dls, OURS).model
    assert model[0].encoder.num_embeddings == model[1].decoder.out_features == len(dls.vocab)


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_a_trace_freezes_the_state(arch):
    model = language_model(arch).eval()
    traced = torch.jit.trace(model, tokens(), check_trace=False)
    assert torch.equal(traced(tokens())[0], traced(tokens())[0])
    assert not torch.equal(model(tokens())[0], model(tokens())[0])


# ---- better


def test_reverse_direction_is_dropped_too():
    """In fastai it never is: with everything else fixed, its outputs repeat."""
    for arch, repeats in ((THEIRS, True), (OURS, False)):
        torch.manual_seed(0)
        model = arch(V, 8, 12, 1, bidir=True, hidden_p=0, input_p=0, embed_p=0, weight_p=0.5)
        x = tokens(3, 9)
        model.reset()
        first = model(x)[..., 4:]  # the reverse direction's half
        model.reset()
        assert torch.equal(first, model(x)[..., 4:]) == repeats


def padded(documents, bptt, first):
    """As fastai's `pad_chunk` pads (first), whole chunks before and the rest after, or all of it after."""
    columns = max(map(len, documents))
    rows = torch.ones(len(documents), columns, dtype=torch.int64)
    for row, document in zip(rows, documents, strict=True):
        begin = (columns - len(document)) // bptt * bptt if first else 0
        row[begin : begin + len(document)] = document
    return rows


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("longest", [19, 20, 21])
def test_documents_are_read_as_when_alone(longest, first):
    """In any order: fastai reads other rows than those that have begun, and reads the last word elsewhere."""
    lengths, bptt = (6, longest, 13, 2, 14, 15, 18), 7  # 15's padding reaches the last chunk's first column
    documents = [tokens(1, n, seed=n)[0] for n in lengths]
    torch.manual_seed(0)
    model = get_text_classifier(THEIRS, V, 2, seq_len=bptt, config=CLAS_CONFIG).eval()
    alone = torch.cat([model(document[None])[0] for document in documents])
    longest_first = torch.tensor(lengths).argsort(descending=True)
    model[0] = uf.SentenceEncoder(bptt, model[0].module, max_len=model[0].max_len).eval()
    head = uf.PoolingLinearClassifier([36, 50, 2], [0.4, 0.1], bptt).eval()
    head.load_state_dict(model[1].state_dict())
    theirs = nn.Sequential(SentenceEncoder(bptt, model[0].module), model[1]).eval()
    model[1] = head
    for order in (longest_first, torch.arange(len(lengths)), longest_first.flip(0)):
        batch = padded(documents, bptt, first)[order]
        right = first and longest % bptt == 0 and order is longest_first  # the one case that is in fastai
        assert torch.allclose(theirs(batch)[0], alone[order], rtol=1e-3) == right
        torch.testing.assert_close(model(batch)[0], alone[order])
    model[0].module = OURS(V, **{k: v for k, v in CLAS_CONFIG.items() if k != "output_p"}).eval()
    mine = torch.cat([model(document[None])[0] for document in documents])
    torch.testing.assert_close(model(padded(documents, bptt, first))[0], mine)


def test_an_empty_document_leaves_the_others():
    encoder = uf.SentenceEncoder(4, OURS(V, 6, 10, 2)).eval()
    x = tokens(3, 10)
    x[1] = 1
    out, mask = encoder(x)
    assert mask[1].all() and not out[1].any()
    torch.testing.assert_close(out[[0, 2]], encoder(x[[0, 2]])[0])


def test_a_document_that_begins_inside_a_chunk_is_an_error():
    """fastai leaves the chunk's tokens out."""
    x = tokens(2, 10)
    x[1, :3] = 1
    encoder = SentenceEncoder(5, THEIRS(V, 6, 10, 1)).eval()
    assert not encoder(x)[0][1, :5].any()
    with pytest.raises(ValueError, match="whole chunks of bptt = 5 .* row 1 begins at 3: give"):
        uf.SentenceEncoder(5, OURS(V, 6, 10, 1))(x)


def test_a_fresh_model_can_be_copied():
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(language_model(THEIRS))
    model = language_model(OURS)
    model(tokens())  # and one that has been used
    assert model[0].rnns[0].module.weight_hh_l0.eq(0).any()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].decoder.weight is twin[0].encoder.weight is not model[0].encoder.weight
        assert torch.equal(twin[0].rnns[0].module.weight_hh_l0, model[0].rnns[0].module.weight_hh_l0)
        twin[0].rnns[0].weight_hh_l0_raw.data.zero_()
        assert not twin[0].rnns[0].module.weight_hh_l0.any()
        assert model[0].rnns[0].module.weight_hh_l0.any()


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation():
    """Of the head's linear layers; the LSTMs stay as they are."""

    def quantised(arch):
        torch.manual_seed(0)
        model = get_text_classifier(arch, V, 2, config=CLAS_CONFIG).eval()
        return model, torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    with pytest.raises(RuntimeError, match="deepcopy"):
        quantised(THEIRS)
    model, small = quantised(OURS)
    assert any("quantized" in type(m).__module__ for m in small.modules())
    torch.testing.assert_close(small(tokens())[0], model(tokens())[0], rtol=0.05, atol=0.02)


def test_compiled_in_one_graph():
    """fastai's encoder makes several; ours compiles with fullgraph=True, training and eval."""
    explained = torch._dynamo.explain(language_model(THEIRS)[0])(tokens())
    assert explained.graph_break_count > 0
    torch._dynamo.reset()
    model, graphs = language_model(OURS)[0], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(tokens())
    model.eval()
    model.reset()
    expected = model(tokens())
    model.reset()
    torch.testing.assert_close(compiled(tokens()), expected)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_scale_in_eval_leaves_the_weights():
    embedding, ids = nn.Embedding(V, 6), tokens()
    before = embedding.weight.detach().clone()
    theirs, ours = AWD_LSTM(V, 6, 8, 1).encoder_dp, uf.EmbeddingDropout(embedding, 0.5).eval()
    torch.testing.assert_close(ours(ids, scale=3.0), 3 * before[ids])
    torch.testing.assert_close(ours(ids, scale=3.0), 3 * before[ids])
    assert torch.equal(embedding.weight, before)
    theirs.emb = nn.Embedding.from_pretrained(before.clone())
    with torch.no_grad():
        theirs.eval()(ids, scale=3.0)
    torch.testing.assert_close(theirs.emb.weight, 3 * before)


def test_too_large_a_drop_mult_is_named():
    """fastai's learner is made, and its first batch dies in dropout with a bare number."""
    theirs = get_text_classifier(THEIRS, V, 2, config=CLAS_CONFIG, drop_mult=2.5)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got 1.25"):
        theirs(tokens())
    with pytest.raises(ValueError, match=r"input_p must be in \[0, 1\).*got 1: .*drop_mult"):
        get_text_classifier(OURS, V, 2, config=CLAS_CONFIG, drop_mult=2.5)
    with pytest.raises(ValueError, match=r"weight_p must be in \[0, 1\).*got 1.25: .*drop_mult"):
        get_text_classifier(OURS, V, 2, config={**CLAS_CONFIG, "input_p": 0.1}, drop_mult=2.5)


@pytest.mark.parametrize("arch, copies", [(THEIRS, 2), (OURS, 0)], ids=["fastai", "ours"])
def test_weights_copied_by_a_call_in_eval(arch, copies):
    model = arch(V, 6, 10, 2).eval()
    shapes = {tuple(rnn.weight_hh_l0_raw.shape) for rnn in model.rnns}
    found = 0
    for shape in shapes:
        with torch.no_grad(), Calls(shape) as calls:
            model(tokens())
        found += len(calls.copies)
    assert found == copies


@pytest.mark.filterwarnings("ignore")
def test_no_weight_dropout(tmp_path):
    """drop_mult=0: fastai's second call finds its raw weight where the dropped one belongs, and dies."""
    x = tokens()
    theirs, ours = (language_model(arch, weight_p=0.0) for arch in (THEIRS, OURS))
    keys = list(theirs.state_dict())
    theirs(x)
    assert set(theirs.state_dict()) - set(keys) == {f"0.rnns.{i}.module.weight_hh_l0" for i in range(2)}
    with pytest.raises(TypeError, match="cannot assign 'torch.FloatTensor' as parameter 'weight_hh_l0'"):
        theirs.eval()(x)
    for _ in range(2):
        ours.train()(x)
        ours.eval()(x)
    assert list(ours.state_dict()) == keys
    # accelerate mends one that has come so far, and restore gives it back in order
    learn = lm_learner(reviews(write_reviews(tmp_path, train=4, test=2), is_lm=True), THEIRS, drop_mult=0.0)
    learn.model(x)
    uf.accelerate(learn)
    assert list(learn.model.state_dict()) == keys
    learn.model(x)
    uf.restore(learn)
    assert list(learn.model.state_dict()) == keys
    learn.model.eval()(x)


def test_odd_sizes_with_bidir_are_an_error():
    """fastai's first call dies on shapes."""
    with pytest.raises(RuntimeError):
        THEIRS(V, 6, 11, 2, bidir=True)(tokens())
    with pytest.raises(ValueError, match="bidir needs an even emb_sz and n_hid, got 6 and 11"):
        OURS(V, 6, 11, 2, bidir=True)
