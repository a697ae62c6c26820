"""TextClassifier: documents of any length, padding and order; gradients across chunks; the head."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast import reference
from ulmfit_fast.classifier import BatchNorm1d
from ulmfit_fast.model import layer_groups

V, E, H = 30, 6, 10
LENGTHS = [17, 2, 0, 8, 9]
NO_DROPOUT = dict(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of bptt tokens; by itself the classifier reads documents as short as these in one."""
    monkeypatch.setattr("ulmfit_fast.classifier._CHUNK_TOKENS", 1)


def classifier(bptt=4, max_len=10, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = uf.TextClassifier(uf.AWDLSTM(V, E, H, 3, **options), 3, bptt=bptt, max_len=max_len)
    return model.to(DEVICE, dtype)


def documents(lengths=LENGTHS, width=17):
    ids = torch.randint(2, V, (len(lengths), width), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return ids, torch.tensor(lengths)  # on the host, where the classifier needs them


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_keys_are_fastais_in_its_order():
    keys = list(classifier().state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    head = [[f"1.layers.{i}.0.{name}" for name in norm] + [f"1.layers.{i}.2.weight"] for i in range(2)]
    encoder = ["0.module." + key for key in classifier()[0].module.state_dict()]
    assert keys == encoder + head[0] + head[1]
    assert classifier()[1].layers[0][2].weight.shape == (50, 3 * E)


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_result_does_not_depend_on_padding_or_order(dtype, tolerance, bidir):
    model = classifier(dtype=dtype, bidir=bidir).eval()
    ids, lengths = documents()
    expected = model(ids, lengths)
    for value in (0, 1, 7, -1, 10**6):  # beyond a length the ids are not even read
        beyond = (torch.arange(22) >= lengths[:, None]).to(DEVICE)
        close(model(F.pad(ids, (0, 5)).masked_fill(beyond, value), lengths), expected, tolerance)
    close(model(ids, lengths.to(DEVICE)), expected, tolerance)
    order = torch.tensor([3, 0, 4, 2, 1])
    close(model(ids[order.to(DEVICE)], lengths[order]), expected[order.to(DEVICE)], tolerance)
    for b, n in enumerate(LENGTHS):
        close(model(ids[b : b + 1, :n], lengths[b : b + 1]), expected[b : b + 1], tolerance)


@pytest.mark.parametrize("bptt, max_len", [(4, 10), (1, 3), (5, None), (72, 1440), (3, 17), (20, 5)])
def test_pools_over_whole_documents_whatever_the_chunks(bptt, max_len):
    model = classifier(bptt, max_len).eval()
    ids, lengths = documents()
    pooled = model[0](ids, lengths)
    encoder = model[0].module
    for b, n in enumerate(LENGTHS):
        encoder.reset()
        encoder.bs = 1
        encoder.reset()
        out = encoder(ids[b : b + 1, :n])[0]
        expected = torch.cat([out[-1], out.amax(0), out.mean(0)]) if n else torch.zeros_like(pooled[b])
        close(pooled[b], expected)
    close(model(ids, lengths), model[1](pooled))


def test_chunks_are_as_few_as_their_tokens_allow(monkeypatch):
    monkeypatch.setattr("ulmfit_fast.classifier._CHUNK_TOKENS", 40)

    def chunks(lengths, bptt=4, max_len=10, **options):
        reader, read = classifier(bptt, max_len, **options).eval()[0], []
        run = reader.module.run
        monkeypatch.setattr(
            reader.module, "run", lambda ids, *a, **k: read.append(ids.shape) or run(ids, *a, **k)
        )
        reader(*documents(lengths, max(lengths)))
        return [tuple(shape) for shape in read]

    assert chunks([17]) == [(1, 7), (1, 10)]  # max_len is a border
    with torch.no_grad():
        assert chunks([17]) == [(1, 17)]
        assert chunks([11], bidir=True) == [(1, 1), (1, 2), (1, 4), (1, 4)]  # the same as with gradients
    assert chunks([91], max_len=None) == [(1, 30), (1, 30), (1, 31)]  # about equal
    assert chunks([9, 3, 9], max_len=None) == [(3, 9)]
    assert chunks([12] * 20, max_len=None) == [(20, 4)] * 3  # no fewer than bptt
    assert chunks([60, 0, 7, 7, 8], max_len=None) == [(1, 25), (1, 25), (4, 10)]  # where few read, many steps
    assert chunks([12], max_len=None, bidir=True) == [(1, 4)] * 3  # which alone counts in both directions


def reference_features(encoder, ids, border):
    """Pooled features of one document by the reference ops, its first `border` tokens without gradient."""

    def read(tokens, state):
        x = encoder.encoder(tokens)
        new = []
        for rnn, (h, c) in zip(encoder.rnns, state, strict=True):
            lstm = rnn.module
            weights = lstm.weight_ih_l0, rnn.weight_hh_l0_raw, lstm.bias_ih_l0, lstm.bias_hh_l0
            x, h, c = reference.lstm(x, h, c, *weights, batch_first=True)
            new.append((h, c))
        return x, new

    with torch.no_grad():
        early, state = read(ids[None, :border], [(None, None)] * len(encoder.rnns))
    late, _ = read(ids[None, border:], state)
    out = torch.cat([early, late], 1)[0]
    return torch.cat([out[-1], out.amax(0), out.mean(0)])


@pytest.mark.parametrize("bptt, max_len", [(4, 10), (3, None), (2, 5)])
def test_gradients_cross_chunks_up_to_max_len_tokens(bptt, max_len):
    model = classifier(bptt, max_len, **NO_DROPOUT)
    ids, lengths = documents()
    encoder = model[0].module
    parameters = list(encoder.parameters())
    weight = torch.linspace(-1, 1, 3 * E, dtype=torch.float64, device=DEVICE)
    grads = torch.autograd.grad((model[0](ids, lengths) @ weight).sum(), parameters)
    borders = [0 if max_len is None else max(0, n - max_len) for n in LENGTHS]
    total = sum(
        reference_features(encoder, ids[b, :n], borders[b]) @ weight for b, n in enumerate(LENGTHS) if n
    )
    for a, b in zip(grads, torch.autograd.grad(total, parameters), strict=True):
        close(a, b, 1e-10)


def test_one_mask_for_the_whole_document():
    """In training too the chunks make no difference, as they all see the same masks."""
    ids, lengths = documents()
    results = []
    for bptt in (3, 17):
        model = classifier(bptt, None)
        torch.manual_seed(5)
        pooled = model[0](ids, lengths)
        pooled.sum().backward()
        results.append((pooled, model[0].module.rnns[1].weight_hh_l0_raw.grad))
    for a, b in zip(*results, strict=True):
        close(a, b)
    torch.manual_seed(6)
    assert not torch.equal(classifier(3, None)[0](ids, lengths), results[0][0])


def test_memory_for_gradients_is_bounded_by_max_len():
    def saved(steps):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            classifier(4, 8)[0](*documents([steps, steps], steps))
        return sum(sizes)

    assert saved(200) == saved(40) < 2 * saved(8)


def test_no_documents_and_empty_documents():
    model = classifier().eval()
    nothing = torch.zeros(0, 4, dtype=torch.long, device=DEVICE)
    assert model(nothing, torch.zeros(0, dtype=torch.long)).shape == (0, 3)
    assert not model[0](nothing.view(2, 0)).any()
    ids, _ = documents()
    close(model(ids), model(ids, torch.full((5,), 17)))
    assert model.train()(ids[:1]).isfinite().all()


def test_one_document_in_training_is_normalised_by_the_running_statistics():
    norm = BatchNorm1d(4, device=DEVICE)
    x = torch.randn(1, 4, device=DEVICE)
    torch.testing.assert_close(norm(x), copy.deepcopy(norm).eval()(x))
    assert norm.num_batches_tracked == 0
    mean = norm(torch.randn(3, 4, device=DEVICE)).mean(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


def test_carried_state_of_the_encoder_is_left_alone():
    model = classifier()
    model[0].module(documents()[0])
    before = copy.deepcopy(model[0].module.hidden)
    model(*documents())
    for a, b in zip(before, model[0].module.hidden, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    model.reset()
    assert not any(h.any() for h, _ in model[0].module.hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    model = classifier(dtype=dtype).eval()
    ids, lengths = documents()
    double = copy.deepcopy(model).double()(ids, lengths)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.float32):
        logits = model(ids, lengths)
    assert logits.dtype == torch.bfloat16
    close(logits.double(), double, 0.05)


def test_no_lengths_under_a_default_device():
    model, (ids, _) = classifier().eval(), documents()
    expected = model(ids)
    with torch.device("meta"):
        assert torch.equal(model(ids), expected)


def test_from_language_model_copies_the_encoder():
    lm = uf.LanguageModel(uf.AWDLSTM(V, E, H, 3)).to(DEVICE)
    lm(documents()[0])
    model = uf.TextClassifier.from_language_model(
        lm, 4, dropout=dict(weight_p=0.25), bptt=5, lin_ftrs=(), ps=(0.2,)
    ).to(DEVICE)
    assert model[0].module.rnns[0].weight_p == 0.25 and lm[0].rnns[0].weight_p == 0.5
    assert torch.equal(model[0].module.encoder.weight, lm[0].encoder.weight)
    assert model[0].module.encoder.weight is not lm[0].encoder.weight
    assert model(*documents()).shape == (5, 4) and model[0].bptt == 5


def test_layer_groups_have_every_parameter_once():
    model = classifier()
    groups = layer_groups(model)
    assert [len(group) for group in groups] == [1, 4, 4, 4, 6]
    assert {p for group in groups for p in group} == set(model.parameters())


@pytest.mark.parametrize("train", [True, False])
def test_copies_and_pickles_after_a_step(train):
    model = classifier().train(train)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(*documents()), torch.tensor([0, 1, 2, 0, 1], device=DEVICE)).backward()
    optimizer.step()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(1)
        expected = copy.deepcopy(model)(*documents())
        torch.manual_seed(1)
        close(other(*documents()), expected)
        assert other.training == train


def test_arguments_are_checked():
    model = classifier()
    ids, lengths = documents()
    for arguments, name in (
        ((ids, lengths + 1), "lengths"),
        ((ids, lengths - 1), "lengths"),
        ((ids, lengths[:2]), "lengths"),
        ((ids, lengths.float()), "lengths"),
        ((ids[0], lengths), "ids"),
        ((ids.float(), lengths), "ids"),
    ):
        with pytest.raises(ValueError, match=name):
            model(*arguments)
    for options in (dict(bptt=0), dict(max_len=0), dict(n_classes=0), dict(ps=(0.1,)), dict(ps=(0.1, 1.5))):
        with pytest.raises(ValueError, match=next(iter(options))):
            uf.TextClassifier(**(dict(encoder=uf.AWDLSTM(V, E, H), n_classes=3) | options))


def test_learns_which_word_was_there_long_ago():
    torch.manual_seed(0)
    model = uf.TextClassifier(uf.AWDLSTM(V, 16, 24, 1, **NO_DROPOUT), 2, bptt=5, ps=(0.0, 0.0)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    ids = torch.randint(4, V, (64, 20)).to(DEVICE)
    labels = torch.arange(64, device=DEVICE) % 2
    ids[:, 1] = 2 + labels
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(ids).argmax(1) == labels).float().mean() > 0.9
