"""load_checkpoint: whoever wrote a file, the weights come out under our names, and misfits are named."""

import sys

import foreign_files as files
import numpy as np
import pytest
import torch
from foreign_files import WORDS, classifier, language_model, packed
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast import archives

IDS = torch.randint(0, 7, (3, 9), generator=torch.Generator().manual_seed(0))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)


def load(tmp_path, content, zipped=True, **options):
    path = tmp_path / "weights.pth"
    path.write_bytes(content if isinstance(content, bytes) else packed(content, zipped))
    return uf.load_checkpoint(path, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_fastai_2_language_model_encoder_and_classifier(tmp_path, zipped):
    lm, clf = language_model(), classifier()
    found = load(tmp_path, lm.state_dict(), zipped)
    assert (found.format, found.kind, found.notes) == ("fastai 2", "language model", ())
    assert found.config == dict(vocab_sz=len(WORDS), emb_sz=6, n_hid=10, n_layers=2, bidir=False)
    assert list(found.state) == list(lm.state_dict())  # the order too: fastai goes by it
    assert equal(found.language_model(), lm) and found.language_model().tie_weights
    assert equal(found.encoder(), lm[0]) and equal(found.classifier(2)[0].module, lm[0])
    found = load(tmp_path, lm[0].state_dict(), zipped)
    assert found.kind == "encoder" and equal(found.encoder(), lm[0]) and found.encoder().pad_token == 1
    with pytest.raises(ValueError, match="weights.pth holds no decoder"):
        found.language_model()
    with pytest.raises(ValueError, match="no classifier head: say n_classes"):
        found.classifier()
    found = load(tmp_path, clf.state_dict(), zipped)
    assert found.kind == "classifier" and equal(found.classifier(), clf)
    assert equal(found.encoder(), clf[0].module) and list(found.state) == list(clf.state_dict())
    with pytest.raises(ValueError, match="a head of 3 classes, not n_classes=2"):
        found.classifier(2)


def test_learner_file_with_its_optimizer(tmp_path, monkeypatch):
    """`learn.save` keeps the optimizer's hyper-parameters in fastcore's list, some of them numpy scalars."""
    fastcore = type(sys)("fastcore.foundation")
    exec("class L:\n    def __init__(self, items): self.items = items", fastcore.__dict__)
    fastcore.L.__module__ = fastcore.__name__
    lm = language_model()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fastcore", type(sys)("fastcore"))
        patch.setitem(sys.modules, "fastcore.foundation", fastcore)
        hypers = fastcore.L([{"lr": np.float64(0.1), "mom": 0.9}])
        content = {"model": lm.state_dict(), "opt": {"state": [{"step": 1}], "hypers": hypers}}
        data = [packed(content, zipped) for zipped in (True, False)]
    for each in data:
        assert equal(load(tmp_path, each).language_model(), lm)


def test_fastai_1(tmp_path):
    lm = language_model(n_layers=3)
    found = load(tmp_path, files.as_fastai_1(lm.state_dict()))
    assert found.format == "fastai 1" and equal(found.language_model(), lm)
    head = {"1.layers.0.weight": torch.zeros(18), "1.layers.2.bias": torch.zeros(50)}
    encoder = {f"0.module.{key}": tensor for key, tensor in files.as_fastai_1(lm[0].state_dict()).items()}
    found = load(tmp_path, encoder | head)
    assert equal(found.encoder(), lm[0]) and "its classifier head is fastai 1's" in found.notes[0]


def test_fastai_07(tmp_path):
    lm = language_model(n_hid=1150)
    nn.init.normal_(lm[1].decoder.bias)
    path = tmp_path / "fwd_wt103.h5"
    path.write_bytes(packed(files.as_fastai_07(lm.state_dict()), zipped=False))
    found = uf.load_checkpoint(path, tokens=WORDS)
    assert found.format == "fastai 0.7" and found.config["n_hid"] == 1150
    assert any("1150 hidden units" in note for note in found.notes)
    assert any("no decoder bias" in note for note in found.notes)
    nn.init.zeros_(lm[1].decoder.bias)
    assert equal(found.language_model(), lm)
    with pytest.raises(ValueError, match="1150 hidden units in the file, 1152 in the model"):
        from ulmfit_fast.checkpoints import load_state

        load_state(language_model(n_hid=1152), found.state, found.source)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_salesforce_pickle_without_its_code(tmp_path, monkeypatch, zipped):
    theirs, data = files.salesforce_pickle(monkeypatch, zipped)
    found = load(tmp_path, data)
    assert found.format == "salesforce" and not {"model", "weight_drop", "splitcross"} & set(sys.modules)
    lm = found.language_model().eval()
    x, want = theirs.encoder(IDS.T), None
    for layer in theirs.rnns:
        lstm = nn.LSTM(layer.module.input_size, layer.module.hidden_size)
        own = {k.removesuffix("_raw"): v for k, v in layer.module.state_dict().items()}
        lstm.load_state_dict(own)
        x = lstm(x)[0]
    want = theirs.decoder(x).transpose(0, 1)
    torch.testing.assert_close(lm(IDS), want)
    assert lm.tie_weights and lm[0].n_layers == 3
    assert lm[0].pad_token is None  # row 1 is a word like any other


def test_salesforce_state_dicts(tmp_path, monkeypatch):
    theirs, _ = files.salesforce_pickle(monkeypatch, True)
    state = dict(theirs.state_dict())
    found = load(tmp_path, state)
    after_eval = state | {"rnns.0.module.weight_hh_l0": torch.zeros(40, 10)}
    assert equal(found.encoder(), load(tmp_path, after_eval).encoder())
    without_drop = {key.replace(".module", "").replace("_raw", ""): t for key, t in state.items()}
    other = load(tmp_path, without_drop)
    assert (found.format, other.format) == ("salesforce", "torch")
    assert equal(found.language_model(), other.language_model())


class Stock(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.rnn = nn.LSTM(6, 6, num_layers=3, bias=bias, batch_first=True)

    def forward(self, ids):
        return self.decoder(self.rnn(self.embedding(ids))[0])


@pytest.mark.parametrize("bias", [True, False])
def test_stock_lstm_stack(tmp_path, bias):
    stock = Stock(bias)
    found = load(tmp_path, stock.state_dict())
    assert found.format == "torch" and bool(found.notes) != bias
    lm = found.language_model().eval()
    torch.testing.assert_close(lm(IDS), stock(IDS))
    assert not lm.tie_weights
    bare = load(tmp_path, nn.LSTM(3, 4, 2, bidirectional=True).state_dict())
    assert len(bare.state) == 16
    with pytest.raises(ValueError, match="an LSTM without an embedding"):
        bare.encoder()


def test_half_precision_files_give_float32_models(tmp_path):
    lm = language_model()
    found = load(tmp_path, {key: tensor.half() for key, tensor in lm.state_dict().items()})
    again = found.language_model().eval()
    assert again.tie_weights and next(again.parameters()).dtype == torch.float32
    assert equal(again, lm.half().float())


def test_wrapped_and_deeply_numbered_names(tmp_path):
    lm = language_model(n_layers=12)
    state = {f"module.{key}": lm.state_dict()[key] for key in reversed(lm.state_dict())}
    found = load(tmp_path, state)
    assert equal(found.language_model(), lm)
    assert any("swapped by what goes by position" in note for note in found.notes)


def test_biases_that_were_swapped_by_value_give_the_same_numbers(tmp_path):
    """Only b_ih + b_hh enters an LSTM: a swap cannot be told, and changes no bit."""
    lm = language_model()
    state = dict(lm.state_dict())
    for i in range(2):
        a, b = (f"0.rnns.{i}.module.bias_{kind}_l0" for kind in ("ih", "hh"))
        state[a], state[b] = state[b], state[a]
    swapped = load(tmp_path, state).language_model().eval()
    assert not equal(lm, swapped) and torch.equal(lm(IDS), swapped(IDS))


def broken(change):
    state = dict(language_model().state_dict())
    change(state)
    return state


MISFITS = {
    "gru": (lambda: nn.GRU(3, 4).state_dict(), r"layer 0 is a GRU's \(3 x 4 rows\)"),
    "no lstm": (lambda: nn.Linear(2, 3).state_dict(), "holds no LSTM weights"),
    "half a layer": (
        lambda: broken(lambda s: s.pop("0.rnns.1.module.bias_hh_l0")),
        "layer 1 lacks bias_hh",
    ),
    "no recurrent weight": (
        lambda: broken(lambda s: s.pop("0.rnns.0.weight_hh_l0_raw")),
        "layer 0 lacks weight_hh",
    ),
    "swapped weights": (
        lambda: broken(lambda s: s.update({"0.rnns.0.weight_hh_l0_raw": s["0.rnns.0.module.weight_ih_l0"]})),
        r"the weights of layer 0 do not fit each other: weight_ih \(40, 6\)",
    ),
    "a bias of another size": (
        lambda: broken(lambda s: s.update({"0.rnns.0.module.bias_hh_l0": torch.zeros(4608)})),
        r"layer 0 do not fit .* bias_hh \(4608,\)",
    ),
    "two embeddings": (
        lambda: broken(lambda s: s.update({"0.encoder_dp.emb.weight": torch.zeros(2, 6)})),
        "0.encoder.weight and 0.encoder_dp.emb.weight should hold one tensor",
    ),
    "another decoder": (
        lambda: broken(lambda s: s.update({"1.decoder.weight": torch.zeros(3, 6)})),
        f"{len(WORDS)} words in the embedding, 3 in the decoder",
    ),
    "another key": (lambda: broken(lambda s: s.update(extra=torch.zeros(1))), "that no AWD-LSTM has: extra"),
    "no tensors": (lambda: {"epoch": 3}, "must hold a state dict or a model, got dict"),
    "keys that are no str": (lambda: {b"a": torch.zeros(1)}, "must hold a state dict or a model, got dict"),
    "a list": (lambda: [1, 2], "must hold a state dict or a model, got list"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_misfits_are_named(tmp_path, what):
    make, message = MISFITS[what]
    with pytest.raises(ValueError, match=f"weights.pth.*{message}"):
        load(tmp_path, make())


def test_shapes_that_no_awdlstm_has(tmp_path):
    stock = nn.ModuleDict({"emb": nn.Embedding(7, 6), "rnn": nn.LSTM(6, 8, 2)})
    found = load(tmp_path, stock.state_dict())
    with pytest.raises(
        ValueError, match=r"an embedding of 6, layers with \[6, 8\] inputs and \[8, 8\] outputs"
    ):
        found.encoder()


def test_words_of_another_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"comes with 3 words, but an embedding of {len(WORDS)}"):
        load(tmp_path, language_model().state_dict(), tokens=["a", "b", "c"])


def test_vocabulary_transfer_is_fastais(tmp_path):
    old = ["a", "b", "twice", "c", "twice"]
    lm = language_model(vocab=5)
    nn.init.normal_(lm[1].decoder.bias)
    found = load(tmp_path, lm.state_dict(), tokens=old)
    new = ["new", "twice", "a", "newer"]
    moved = found.with_tokens(new)
    assert moved.known == 2 and moved.tokens == new and moved.config["vocab_sz"] == 4
    mine = moved.language_model()
    for ours, theirs in (
        (mine[0].encoder.weight, lm[0].encoder.weight),
        (mine[1].decoder.bias, lm[1].decoder.bias),
    ):
        assert torch.equal(ours[1], theirs[4]) and torch.equal(ours[2], theirs[0])
        torch.testing.assert_close(ours[[0, 3]], theirs.mean(0).expand(2, *theirs.shape[1:]))
    with pytest.raises(ValueError, match="does not say its words"):
        load(tmp_path, lm.state_dict()).with_tokens(new)
    learner = pytest.importorskip("fastai.text.learner")
    theirs = learner.match_embeds(dict(lm.state_dict()), old, new)
    for key in ("0.encoder.weight", "1.decoder.weight", "1.decoder.bias"):
        torch.testing.assert_close(moved.state[key], theirs[key])


@pytest.mark.parametrize("name", ["wt103-fwd.tgz", "wt103-bwd.tgz"])
def test_published_archive(tmp_path, name):
    lm = language_model(n_layers=3)
    path = files.published(tmp_path / name, lm, names=(f"lstm_{name[6:9]}.pth", "itos_wt103.pkl"))
    for address in (path, str(path), path.as_uri()):
        found = uf.load_checkpoint(address)
        assert found.format == "fastai 1" and found.tokens == WORDS and equal(found.language_model(), lm)
    assert found.encoder().pad_token == WORDS.index("xxpad") and sorted(tmp_path.iterdir()) == [path]


def test_published_size_with_other_bytes(tmp_path, monkeypatch):
    path = files.published(tmp_path / "wt103-fwd.tgz", language_model())
    monkeypatch.setitem(archives.PUBLISHED, "https://x/wt103-fwd.tgz", (path.stat().st_size, "0" * 32))
    with pytest.raises(ValueError, match="wt103-fwd.tgz is not the published file: .* with md5"):
        uf.load_checkpoint(path)
