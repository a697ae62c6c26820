"""to_torch(): the same numbers from stock modules alone, also where this library is not installed."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.to_torch import torch_key

V, E, H = 30, 6, 10
LENGTHS = [17, 2, 0, 8, 11, 10]
LSTM = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}


def encoder(**options):
    torch.manual_seed(0)
    return uf.AWDLSTM(V, E, H, 3, **options).to(DEVICE).double()


def language_model(bidir=False, **options):
    return uf.LanguageModel(encoder(bidir=bidir), **options).to(DEVICE).double().eval()


def classifier(bptt=4, max_len=10, bidir=False, **options):
    model = uf.TextClassifier(encoder(bidir=bidir), 3, bptt=bptt, max_len=max_len, **options)
    model.to(DEVICE).double().train()(torch.randint(V, (9, 12), device=DEVICE))  # running statistics to copy
    return model.eval()


def tokens(batch=4, steps=9):
    return torch.randint(V, (batch, steps), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def documents():
    return tokens(len(LENGTHS), max(LENGTHS)), torch.tensor(LENGTHS, device=DEVICE)


def close(a, b, dtype=torch.float64):
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bidir", [False, True])
def test_language_model_equals_ours_and_carries_its_state(bidir, dtype):
    lm = language_model(bidir).to(dtype)
    stock = lm.to_torch()
    state = ()
    for steps in (9, 1, 4):
        logits, *state = stock(tokens(4, steps), *state)
        close(logits, lm(tokens(4, steps)), dtype)
        for theirs, ours in zip(state[0], lm[0].hidden, strict=True):
            close(theirs, ours, dtype)
    state = [tuple(each[:, :2].contiguous() for each in layer) for layer in lm[0].hidden]  # as cuDNN wants it
    close(stock(tokens(2), state)[0], lm(tokens(2)), dtype)
    lm.reset()
    close(stock(tokens(7, 3))[0], lm(tokens(7, 3)), dtype)


def test_encoder_equals_ours():
    ours = encoder().eval()
    output, state = ours.to_torch()(tokens())
    close(output, ours(tokens()))
    close(state[-1], ours.hidden[-1])


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("bptt, max_len", [(4, 10), (1, 3), (5, None), (72, 1440), (3, 17), (20, 5), (4, 8)])
def test_classifier_equals_ours_whatever_the_chunks(bptt, max_len, bidir, monkeypatch):
    monkeypatch.setattr("ulmfit_fast.classifier._CHUNK_TOKENS", 1)  # bptt tokens a chunk, so short are these
    model = classifier(bptt, max_len, bidir)
    stock = model.to_torch()
    ids, lengths = documents()
    expected = model(ids, lengths)
    close(stock(ids, lengths), expected)
    ids[torch.arange(ids.size(1), device=DEVICE) >= lengths[:, None]] = -7  # never read
    close(stock(ids, lengths), expected)
    close(stock(ids[1:2, :5].int(), lengths[1:2].int()), expected[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifier_in_other_dtypes(dtype):
    model = classifier(lin_ftrs=(), ps=(0.1,)).to(dtype)
    close(model.to_torch()(*documents()), model(*documents()), dtype)


def test_only_stock_modules_and_their_names():
    rnns = [f"rnns.{layer}.{name}" for layer in range(3) for name in LSTM]
    both_ways = [f"rnns.0.{name}{suffix}" for suffix in ("", "_reverse") for name in LSTM]
    lm, clf = language_model(), classifier()
    assert list(encoder().to_torch().state_dict()) == ["encoder.weight", *rnns]
    assert list(encoder(bidir=True).to_torch().state_dict())[1:9] == both_ways
    assert list(lm.to_torch().state_dict()) == ["encoder.weight", *rnns, "decoder.weight", "decoder.bias"]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    head = [[f"head.{i}.0.{name}" for name in norm] + [f"head.{i}.2.weight"] for i in range(2)]
    assert list(clf.to_torch().state_dict()) == ["encoder.weight", *rnns, *head[0], *head[1]]
    for model in (lm, clf):
        children = list(model.to_torch().modules())[1:]
        assert all(type(module).__module__.startswith("torch.nn.") for module in children)
        assert not any(module.training for module in children)


@pytest.mark.parametrize("make", [encoder, language_model, classifier])
@pytest.mark.parametrize("bidir", [False, True])
def test_torch_key_names_the_same_tensors(make, bidir):
    model = make(bidir=bidir)
    state, stock = model.state_dict(), model.to_torch().state_dict()
    names = {torch_key(key): key for key in state}
    assert names.pop(None).endswith("encoder_dp.emb.weight")
    assert set(names) == set(stock)
    for name, key in names.items():
        assert torch.equal(stock[name], state[key])


def test_weights_are_copies_and_tied_as_they_were():
    lm = language_model()
    stock, expected = lm.to_torch(), lm(tokens())
    nn.init.zeros_(lm[0].encoder.weight)
    for other in (stock, copy.deepcopy(stock), pickle.loads(pickle.dumps(stock))):
        assert other.decoder.weight is other.encoder.weight and other.encoder.padding_idx == 1
        close(other(tokens())[0], expected)
    untied = language_model(tie_weights=False, bias=False).to_torch()
    assert untied.decoder.weight is not untied.encoder.weight and untied.decoder.bias is None


def test_the_way_back_again():
    lm = language_model()
    stock = lm.to_torch()
    other = language_model()
    nn.init.zeros_(other[0].rnns[1].weight_hh_l0_raw)
    names = {key: torch_key(key) or "encoder.weight" for key in other.state_dict()}
    other.load_state_dict({key: stock.state_dict()[name] for key, name in names.items()})
    close(other(tokens()), stock(tokens())[0])


def test_stock_model_learns():
    stock = classifier().to_torch().train()
    labels = torch.tensor([0, 1, 2, 0, 1, 2], device=DEVICE)
    nn.functional.cross_entropy(stock(*documents()), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stock.parameters())


ELSEWHERE = """
import sys
sys.modules["ulmfit_fast"] = None  # importing it raises
import torch
try:
    import ulmfit_fast
except ImportError:
    pass
else:
    raise SystemExit("ulmfit_fast is still there")
for name in sys.argv[1:]:
    model, arguments, expected = torch.load(name, weights_only=False)
    torch.testing.assert_close(model(*arguments), expected)
print("equal")
"""


def test_runs_where_this_library_is_not_installed(tmp_path):
    lm, clf = language_model(), classifier(bidir=True)
    for name, stock, arguments in (
        ("lm", lm.to_torch(), (tokens(),)),
        ("state", lm.to_torch(), (tokens(1, 3), [(h[:, :1], c[:, :1]) for h, c in lm[0].hidden])),
        ("classifier", clf.to_torch(), documents()),
    ):
        torch.save((stock, arguments, stock(*arguments)), tmp_path / name)
        assert b"ulmfit" not in (tmp_path / name).read_bytes()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ELSEWHERE, "lm", "state", "classifier"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
