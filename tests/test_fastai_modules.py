"""What fastai's own notebooks assert of its text modules, asserted of ours; their interface."""

import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from checks_fastai import CLAS_CONFIG, LM_CONFIG, OURS, THEIRS
from fastai.text.all import (
    LinearDecoder,
    SequentialRNN,
    decode_spec_tokens,
    get_language_model,
    get_text_classifier,
)
from fastai.text.models import awdlstm
from fastai.text.models.core import PoolingLinearClassifier, masked_concat_pool
from torch import nn

from ulmfit_fast import fastai as uf

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")


# ---- the notebooks: 32_text.models.awdlstm, 33_text.models.core, 37_text.learner


def test_dropout_mask_has_the_shape_and_two_values():
    mask = uf.dropout_mask(torch.randn(3, 4), [4, 3], 0.25)
    assert mask.shape == (4, 3) and mask.dtype == torch.float32
    assert ((mask == 4 / 3) | (mask == 0)).all()
    big = uf.dropout_mask(torch.randn(1), [100, 100], 0.25)
    assert 0.2 < (big == 0).float().mean() < 0.3


def test_rnn_dropout_is_constant_over_time():
    dropout, x = uf.RNNDropout(0.3), torch.randn(4, 3, 7)
    out = dropout(x)
    for i in range(4):
        for j in range(7):
            dropped = out[i, 0, j] == 0
            torch.testing.assert_close(out[i, :, j], torch.zeros(3) if dropped else x[i, :, j] / 0.7)
    assert 0 < (out == 0).sum() < out.numel()


def test_rnn_dropout_takes_images_over_time():
    out = uf.RNNDropout(0.3)(torch.rand(4, 10, 3, 32, 32))
    assert out.shape == (4, 10, 3, 32, 32)
    assert torch.equal((out == 0).all(1), (out == 0).any(1))


def test_weight_dropout():
    layer = uf.WeightDropout(nn.LSTM(5, 7), 0.4)
    before = layer.module.weight_hh_l0
    x, h = torch.randn(10, 20, 5), (torch.zeros(1, 20, 7), torch.zeros(1, 20, 7))
    layer.reset()
    assert torch.equal(before, layer.weight_hh_l0_raw)
    out, h = layer(x, h)
    out.sum().backward()
    dropped, raw = layer.module.weight_hh_l0, layer.weight_hh_l0_raw
    assert 0.2 <= (dropped == 0).float().mean() <= 0.6
    assert raw.requires_grad and raw.grad is not None
    assert ((raw.grad == 0) & (dropped == 0)).any()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], raw[kept] / 0.6)
    layer.reset()
    assert torch.equal(layer.module.weight_hh_l0, raw)


def test_embedding_dropout_drops_or_scales_whole_rows():
    embedding = nn.Embedding(10, 7, padding_idx=1)
    ids = torch.randint(0, 10, (8,))
    out = uf.EmbeddingDropout(embedding, 0.5)(ids)
    for row, word in zip(out, ids, strict=True):
        assert (row == 0).all() or torch.allclose(row, 2 * embedding.weight[word])
    assert (out == 0).any() and (out != 0).any()


def test_awd_lstm_output_and_state():
    model = OURS(100, 20, 10, 2, hidden_p=0.2, embed_p=0.02, input_p=0.1, weight_p=0.2)
    x = torch.randint(0, 100, (10, 5))
    out = model(x)
    assert model.bs == 10 and len(model.hidden) == 2
    assert [h.shape for h in model.hidden[0]] == [(1, 10, 10)] * 2
    assert [h.shape for h in model.hidden[1]] == [(1, 10, 20)] * 2
    assert out.shape == (10, 5, 20)
    assert torch.equal(out[:, -1], model.hidden[-1][0][0])
    model.eval()
    model.reset()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)  # the second goes on from the first


@pytest.mark.parametrize("bidir", [False, True])
def test_awd_lstm_batch_may_shrink_and_grow(bidir):
    model = OURS(100, 20, 10, 2, bidir=bidir)
    for batch in (10, 6, 8):
        assert model(torch.randint(0, 100, (batch, 5))).shape == (batch, 5, 20)
        assert model.bs == batch and model.hidden[0][0].shape == (1 + bidir, batch, 10 // (1 + bidir))


def test_linear_decoder_on_our_encoder():
    encoder = OURS(100, 20, 10, 2)
    x = encoder(torch.randint(0, 100, (10, 5)))
    logits, raw, dropped = LinearDecoder(100, 20, 0.1)(x)
    assert torch.equal(raw, x) and dropped.shape == x.shape and logits.shape == (10, 5, 100)
    assert LinearDecoder(100, 20, 0.1, tie_encoder=encoder.encoder).decoder.weight is encoder.encoder.weight


def test_sequential_rnn_resets_every_child():
    models = [OURS(20, 6, 10, 2), OURS(20, 6, 10, 2)]
    for model in models:
        model(torch.randint(0, 20, (3, 4)))
        assert model.hidden[0][0].any()
    SequentialRNN(*models).reset()
    assert not any(h.any() for model in models for state in model.hidden for h in state)


def test_language_model_outputs():
    model = get_language_model(OURS, 100, LM_CONFIG)
    logits, raw, dropped = model(torch.randint(0, 100, (10, 5)))
    assert logits.shape == (10, 5, 100) and raw.shape == dropped.shape == (10, 5, 12)
    assert model[1].decoder.weight is model[0].encoder.weight


def test_drop_mult_scales_the_five_probabilities():
    model = get_language_model(OURS, 100, LM_CONFIG, drop_mult=0.5)
    encoder, decoder = model
    assert decoder.output_dp.p == LM_CONFIG["output_p"] / 2
    assert {rnn.weight_p for rnn in encoder.rnns} == {LM_CONFIG["weight_p"] / 2}
    assert {dropout.p for dropout in encoder.hidden_dps} == {LM_CONFIG["hidden_p"] / 2}
    assert encoder.encoder_dp.embed_p == LM_CONFIG["embed_p"] / 2
    assert encoder.input_dp.p == LM_CONFIG["input_p"] / 2


def test_drop_mult_leaves_the_heads_inner_dropout():
    head = get_text_classifier(OURS, 100, 3, config=CLAS_CONFIG, drop_mult=0.5)[1]
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [CLAS_CONFIG["output_p"] / 2, 0.1]


def test_sentence_encoder_is_the_module_where_not_padded():
    module = nn.Embedding(5, 10)
    x = torch.randint(1, 5, (3, 15))
    x[2, :5] = 0
    out, mask = uf.SentenceEncoder(5, module, pad_idx=0)(x)
    assert torch.equal(out[:1], module(x)[:1]) and torch.equal(out[2, 5:], module(x)[2, 5:])
    assert torch.equal(mask, x == 0)


def test_masked_concat_pool_reads_no_padding():
    out, other = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, False, False], [False, False, False, True]])
    pooled = masked_concat_pool(out, mask, 2)
    for row, valid, last in ((0, slice(2, None), -1), (1, slice(3), -2)):
        expected = torch.cat([out[row, last], out[row, valid].amax(0), out[row, valid].mean(0)])
        torch.testing.assert_close(pooled[row], expected)
        other[row, valid] = out[row, valid]
    assert torch.equal(masked_concat_pool(other, mask, 2), pooled)


def test_a_column_of_padding_changes_nothing():
    encoder = OURS(20, 10, 12, 2, pad_token=0).eval()
    model = nn.Sequential(
        uf.SentenceEncoder(5, encoder, pad_idx=0), PoolingLinearClassifier([30, 4], [0.0], 5)
    ).eval()
    x = torch.randint(1, 20, (3, 14))
    x[2, :5] = 0
    wider = torch.cat([x, torch.zeros(3, 1, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(wider)[0], model(x)[0])


@pytest.mark.parametrize(
    "tokens, words",
    [
        (["xxmaj", "text"], ["Text"]),
        (["xxup", "text"], ["TEXT"]),
        (["xxrep", "3", "a"], ["aaa"]),
        (["xxwrep", "3", "word"], ["word", "word", "word"]),
    ],
)
def test_decode_spec_tokens(tokens, words):
    assert decode_spec_tokens(tokens) == words


# ---- the interface


def test_constructor_is_fastais():
    theirs, ours = (inspect.signature(arch).parameters.values() for arch in (THEIRS, OURS))
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    for name in ("SentenceEncoder", "WeightDropout", "EmbeddingDropout", "dropout_mask"):
        kind = getattr(uf, name), getattr(awdlstm, name, None) or uf.SentenceEncoder.__mro__[1]
        ours, theirs = (list(inspect.signature(k).parameters) for k in kind)
        assert ours == theirs, name


@pytest.mark.parametrize("bidir", [False, True])
def test_attributes_are_fastais(bidir):
    theirs, ours = (arch(30, 6, 10, 3, bidir=bidir) for arch in (THEIRS, OURS))
    for name in ("emb_sz", "n_hid", "n_layers", "pad_token", "bs", "n_dir", "initrange"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for mine, other in zip(ours.rnns, theirs.rnns, strict=True):
        assert list(mine.layer_names) == list(other.layer_names) and mine.weight_p == other.weight_p
        for name in ("input_size", "hidden_size", "num_layers", "batch_first", "bidirectional"):
            assert getattr(mine.module, name) == getattr(other.module, name), name
        assert mine.module.weight_hh_l0.shape == other.module.weight_hh_l0.shape
    shapes = [[tuple(h.shape) for h in state] for state in theirs.hidden]
    assert [[tuple(h.shape) for h in state] for state in ours.hidden] == shapes


def test_modules_are_found_by_fastais_classes():
    """As by a loop over the modules that changes every dropout."""
    theirs, ours = (get_language_model(arch, 30, LM_CONFIG) for arch in (THEIRS, OURS))
    for name in ("RNNDropout", "EmbeddingDropout", "WeightDropout", "AWD_LSTM"):
        kind = getattr(awdlstm, name)
        found = [[n for n, m in model.named_modules() if isinstance(m, kind)] for model in (ours, theirs)]
        assert found[0] == found[1] != []
    missing = {name for name in dir(theirs[0]) if not hasattr(ours[0], name)}
    assert not missing
    twin = pickle.loads(pickle.dumps(ours))
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]


def test_probabilities_are_any_numbers():
    config = {**LM_CONFIG, "weight_p": np.float32(0.25), "hidden_p": torch.tensor(0.5), "input_p": 0}
    encoder = get_language_model(OURS, 30, config)[0]
    assert [rnn.weight_p for rnn in encoder.rnns] == [0.25] * 2
    assert [dropout.p for dropout in encoder.hidden_dps] == [0.5] * 2 and encoder.input_dp.p == 0
    encoder(torch.randint(0, 30, (2, 4)))
    with pytest.raises(TypeError, match="hidden_p must be a number, got None"):
        OURS(30, 6, 10, 2, hidden_p=None)


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("classifier", [False, True])
def test_keys_shapes_and_parameters_are_fastais_in_order(bidir, classifier):
    def model(arch):
        if classifier:
            return get_text_classifier(arch, 30, 2, config={**CLAS_CONFIG, "bidir": bidir})
        return get_language_model(arch, 30, {**LM_CONFIG, "bidir": bidir})

    theirs, ours = model(THEIRS), model(OURS)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    for (name, mine), value in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, value), name
    theirs.load_state_dict(model(OURS).state_dict())


def test_size_at_ulmfits_defaults():
    with torch.device("meta"):
        model = get_language_model(OURS, 60008)
    assert sum(p.numel() for p in model.parameters()) == 44_336_488


def test_wrapped_modules_are_checked():
    for module, error, message in [
        (nn.GRU(3, 4), TypeError, "module must be an nn.LSTM, got GRU"),
        (nn.LSTM(3, 4, num_layers=2), ValueError, "module must have one layer"),
        (nn.LSTM(3, 4, bias=False), ValueError, "module must have one layer, biases"),
    ]:
        with pytest.raises(error, match=message):
            uf.WeightDropout(module, 0.5)
    with pytest.raises(ValueError, match="layer_names must be 'weight_hh_l0'.*weight_ih_l0"):
        uf.WeightDropout(nn.LSTM(3, 4), 0.5, ["weight_ih_l0"])


def test_without_fastai_the_import_says_what_to_install():
    code = "import sys; sys.modules['fastai'] = None; import ulmfit_fast.fastai"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: ulmfit_fast.fastai needs fastai 2: pip install fastai" in done.stderr
