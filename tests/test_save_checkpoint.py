"""save_checkpoint: what we write, others load, with the same numbers; and it comes back as it was."""

import os
import pickle
import warnings

import foreign_files as files
import pytest
import torch
from foreign_files import WORDS, classifier, language_model
from torch import nn

import ulmfit_fast as uf
from ulmfit_fast.salesforce import RNNModel

FORMATS = ("ulmfit_fast", "fastai", "salesforce", "torch")
IDS = torch.randint(0, len(WORDS), (3, 9), generator=torch.Generator().manual_seed(0))
MODELS = {
    "language model": language_model,
    "untied language model": lambda: uf.LanguageModel(uf.AWDLSTM(len(WORDS), 6, 10, 3), tie_weights=False),
    "encoder": lambda: language_model()[0],
    "classifier": classifier,
    "bidirectional language model": lambda: language_model(bidir=True),
    "one layer": lambda: language_model(n_hid=6, n_layers=1),
}


def loaded(checkpoint):
    builders = {"classifier": "classifier", "encoder": "encoder", "language model": "language_model"}
    return getattr(checkpoint, builders[checkpoint.kind])()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("what", MODELS)
def test_round_trip(tmp_path, what, format):
    model, path = MODELS[what](), tmp_path / "file"
    if format == "salesforce" and what.startswith(("classifier", "bidirectional")):
        kind = "classifier" if what == "classifier" else "bidirectional LSTM"
        with pytest.raises(ValueError, match=f"format 'salesforce' has no {kind}"):
            uf.save_checkpoint(path, model, format)
        assert not path.exists()
        return
    uf.save_checkpoint(path, model, format)
    found = uf.load_checkpoint(path)
    assert found.format == ("fastai 2" if format == "fastai" else format) and not found.notes
    again, state = loaded(found), model.state_dict()
    assert type(again) is type(model) and list(again.state_dict()) == list(state)
    assert all(torch.equal(state[key], tensor) for key, tensor in again.state_dict().items())
    assert getattr(again, "tie_weights", None) == getattr(model, "tie_weights", None)
    uf.save_checkpoint(tmp_path / "second", found, format)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "second"}
    assert found.state.keys() == uf.load_checkpoint(tmp_path / "second").state.keys()


def test_tied_weights_are_written_once(tmp_path):
    lm = language_model(vocab=5000)
    for format in FORMATS:
        uf.save_checkpoint(tmp_path / format, lm, format)
        assert (tmp_path / format).stat().st_size < 1.5 * lm[0].encoder.weight.nbytes


def test_words_go_along(tmp_path):
    lm = language_model()
    uf.save_checkpoint(tmp_path / "ours", lm, tokens=WORDS)
    assert uf.load_checkpoint(tmp_path / "ours").tokens == WORDS
    uf.save_checkpoint(tmp_path / "lm.pth", uf.load_checkpoint(tmp_path / "ours"), "fastai")
    assert pickle.loads((tmp_path / "lm_itos.pkl").read_bytes()) == WORDS
    assert uf.load_checkpoint(tmp_path / "lm.pth", tokens=tmp_path / "lm_itos.pkl").tokens == WORDS
    found = uf.load_checkpoint(tmp_path / "lm.pth")  # finds the file beside it
    assert found.tokens == WORDS and found.notes == ()
    assert uf.load_checkpoint(tmp_path / "lm.pth", tokens=WORDS[::-1]).tokens == WORDS[::-1]
    for content, why in ((["a"], "1 words for 22 rows"), ({"a": 1}, "is not a pickled list of words")):
        (tmp_path / "lm_itos.pkl").write_bytes(pickle.dumps(content))
        found = uf.load_checkpoint(tmp_path / "lm.pth")
        assert found.tokens is None and "lm_itos.pkl, beside it, is not taken" in found.notes[0]
        assert why in found.notes[0]
        with pytest.raises(ValueError, match=f"lm.pth' does not say its words .lm_itos.pkl, .*{why}"):
            uf.finetune_lm(tmp_path / "lm.pth", ["a text"], tmp_path / "run")
    with pytest.raises(ValueError, match="one word for each row of the embedding, got 2"):
        uf.save_checkpoint(tmp_path / "x", lm, tokens=["a", "b"])
    with pytest.raises(ValueError, match="format must be one of ulmfit_fast, fastai, .* got 'keras'"):
        uf.save_checkpoint(tmp_path / "x", lm, "keras")
    with pytest.raises(ValueError, match="model holds no LSTM weights"):
        uf.save_checkpoint(tmp_path / "x", nn.Linear(2, 3))
    assert not (tmp_path / "x").exists()


def test_words_of_another_model_beside_are_told(tmp_path):
    file, beside = tmp_path / "lm.pth", tmp_path / "lm_itos.pkl"
    uf.save_checkpoint(file, language_model(), "fastai", WORDS)
    os.utime(beside, (file.stat().st_mtime - 7200,) * 2)
    assert uf.load_checkpoint(file).notes == (
        "lm_itos.pkl, beside it, is older than lm.pth: are its words this model's?",
    )
    with pytest.warns(UserWarning, match="lm_itos.pkl stays as it was, .* the words of lm.pth: give tokens="):
        uf.save_checkpoint(file, language_model(), "fastai")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uf.save_checkpoint(file, language_model(), "torch")
        uf.save_checkpoint(file, language_model(), "fastai", WORDS)
        beside.unlink()
        uf.save_checkpoint(file, language_model(), "fastai")


@pytest.mark.parametrize("format", FORMATS)
def test_a_decoder_without_bias(tmp_path, format):
    """Stays so, except in salesforce's RNNModel, whose decoder always has one."""
    lm = uf.LanguageModel(language_model()[0], bias=False).eval()
    uf.save_checkpoint(tmp_path / "lm", lm, format)
    found = uf.load_checkpoint(tmp_path / "lm")
    again = found.language_model().eval()
    torch.testing.assert_close(again(IDS), lm(IDS))
    if format == "salesforce":
        assert not again[1].decoder.bias.any()
        return
    assert again[1].decoder.bias is None and list(again.state_dict()) == list(lm.state_dict())
    assert found.notes == ("no decoder bias in the file, and none in its language model",)
    assert not found.with_bias().language_model()[1].decoder.bias.any()
    assert not RNNModel.from_checkpoint(found).decoder.bias.any()
    moved = uf.load_checkpoint(tmp_path / "lm", tokens=WORDS).with_tokens(WORDS[::-1])
    assert moved.known == len(WORDS) and moved.language_model()[1].decoder.bias is None


def test_stock_modules_load_the_torch_format(tmp_path):
    lm = language_model(n_layers=3)
    uf.save_checkpoint(tmp_path / "lm.pt", lm, "torch")
    stock = nn.ModuleDict(
        {
            "encoder": nn.Embedding(len(WORDS), 6),
            "rnns": nn.ModuleList([nn.LSTM(6, 10), nn.LSTM(10, 10), nn.LSTM(10, 6)]),
            "decoder": nn.Linear(6, len(WORDS)),
        }
    )
    stock.load_state_dict(torch.load(tmp_path / "lm.pt"))
    x = stock["encoder"](IDS.T)
    for rnn in stock["rnns"]:
        x = rnn(x)[0]
    torch.testing.assert_close(stock["decoder"](x).transpose(0, 1), lm(IDS))


def test_stock_modules_load_a_classifier(tmp_path):
    clf = classifier()
    uf.save_checkpoint(tmp_path / "clf.pt", clf, "torch")
    state = torch.load(tmp_path / "clf.pt")
    blocks = [
        nn.Sequential(nn.BatchNorm1d(18), nn.Dropout(0.4), nn.Linear(18, 50, bias=False), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(50), nn.Dropout(0.1), nn.Linear(50, 3, bias=False)),
    ]
    stock = nn.ModuleDict({"head": nn.Sequential(*blocks)}).eval()
    stock.load_state_dict({key: tensor for key, tensor in state.items() if key.startswith("head")})
    pooled = clf[0](IDS)
    torch.testing.assert_close(stock["head"](pooled), clf(IDS))


def test_salesforces_model_loads_its_format(tmp_path):
    lm = language_model(n_layers=3)
    uf.save_checkpoint(tmp_path / "lm.pt", lm, "salesforce")
    state = torch.load(tmp_path / "lm.pt")
    theirs = files.RNNModel(len(WORDS), 6, 10, 3)
    assert list(theirs.state_dict()) == list(state)
    theirs.load_state_dict(state)
    ours = RNNModel("LSTM", len(WORDS), 6, 10, 3, wdrop=0.5, tie_weights=True).eval()
    ours.load_state_dict(state)
    output, _ = ours(IDS.T, ours.init_hidden(3))
    torch.testing.assert_close(ours.decoder(output).view(9, 3, -1).transpose(0, 1), lm(IDS))


def fastai_learners(path, **config):
    """(language model learner, classifier learner) of real fastai on a few sentences, with small sizes.

    config: of the language model.
    """
    text = pytest.importorskip("fastai.text.all", exc_type=ImportError)
    for i in range(40):
        folder = path / ("train", "test")[i % 2] / ("good", "bad")[i // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text("The film was fine and the song was dull .", encoding="utf-8")
    options = dict(valid="test", bs=4, seq_len=8, n_workers=1, num_workers=0, device=torch.device("cpu"))
    sizes = dict(emb_sz=6, n_hid=10, n_layers=2)
    lm_dls = text.TextDataLoaders.from_folder(path, is_lm=True, text_vocab=WORDS, **options)
    clf_dls = text.TextDataLoaders.from_folder(path, text_vocab=WORDS, **options)
    lm = text.language_model_learner(
        lm_dls, text.AWD_LSTM, pretrained=False, config=text.awd_lstm_lm_config | sizes | config, path=path
    )
    clf = text.text_classifier_learner(
        clf_dls, text.AWD_LSTM, pretrained=False, config=text.awd_lstm_clas_config | sizes, path=path
    )
    return lm, clf


def test_fastais_learners_load_ours_and_we_theirs(tmp_path):
    theirs, their_clf = fastai_learners(tmp_path)
    (tmp_path / "models").mkdir(exist_ok=True)
    rows = theirs.model[0].encoder.num_embeddings
    lm, clf = language_model(vocab=rows), uf.TextClassifier(uf.AWDLSTM(rows, 6, 10, 2), 2).eval()
    torch.nn.init.normal_(lm[1].decoder.bias)
    words = [f"w{i}" for i in range(rows)]
    ids = (IDS % rows).clamp(min=2)  # no padding

    uf.save_checkpoint(tmp_path / "models/lm.pth", lm, "fastai")
    theirs.load("lm")
    theirs.model.eval().reset()
    lm.reset()
    torch.testing.assert_close(theirs.model(ids)[0], lm(ids))
    theirs.save("back")  # with its optimizer
    again = uf.load_checkpoint(tmp_path / "models/back.pth").language_model().eval()
    assert all(torch.equal(t, lm.state_dict()[key]) for key, t in again.state_dict().items())

    uf.save_checkpoint(tmp_path / "models/encoder.pth", lm[0], "fastai")
    their_clf.load_encoder("encoder")
    assert torch.equal(their_clf.model[0].module.rnns[1].weight_hh_l0_raw, lm[0].rnns[1].weight_hh_l0_raw)
    uf.save_checkpoint(tmp_path / "models/clf.pth", clf, "fastai")
    their_clf.load("clf")
    their_clf.model.eval()
    torch.testing.assert_close(their_clf.model(ids)[0], clf(ids))
    their_clf.save("clf_back", with_opt=False)
    assert uf.load_checkpoint(tmp_path / "models/clf_back.pth").kind == "classifier"

    for tensor in lm.parameters():
        torch.nn.init.normal_(tensor)
    uf.save_checkpoint(tmp_path / "models/start.pth", lm, "fastai", tokens=words)
    theirs.load_pretrained(tmp_path / "models/start.pth", tmp_path / "models/start_itos.pkl")  # by position
    for i in range(2):  # each weight under its own name
        ours, layer = lm[0].rnns[i], theirs.model[0].rnns[i]
        assert torch.equal(layer.weight_hh_l0_raw, ours.weight_hh_l0_raw)
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            assert torch.equal(getattr(layer.module, name), getattr(ours.module, name))


def test_fastais_learner_without_bias_and_back(tmp_path):
    theirs, _ = fastai_learners(tmp_path, out_bias=False)
    theirs.save("lm")
    path, rows = tmp_path / "models/lm.pth", theirs.model[0].encoder.num_embeddings
    lm = uf.load_checkpoint(path).language_model().eval()
    theirs.model.eval().reset()
    ids = (IDS % rows).clamp(min=2)  # no padding
    expected = theirs.model(ids)[0]
    torch.testing.assert_close(lm(ids), expected)
    torch.nn.init.zeros_(theirs.model[0].rnns[0].weight_hh_l0_raw)
    uf.save_checkpoint(path, lm, "fastai")
    theirs.load("lm")
    theirs.model.eval().reset()
    torch.testing.assert_close(theirs.model(ids)[0], expected)
