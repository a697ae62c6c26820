"""Stages 2 and 3 that start from a published checkpoint: its words, its weights, its sizes."""

import json

import foreign_files as files
import pytest
import torch
from checks import DEVICE
from foreign_files import WORDS, language_model
from stages import TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast.cli import main
from ulmfit_fast.text import SPECIALS, own_vocab

pytest.importorskip("tokenizers")
TEXTS, LABELS = sentences(24)
STILL = TINY | dict(lr=0.0, weight_decay=0.0, epochs=1)  # the model stays as it begins
FASTAI_1 = ["xxunk", "xxpad", "xxbos", "xxeos", "xxfld", "xxmaj", "xxup", "xxrep", "xxwrep"]  # its order


@pytest.fixture
def archive(tmp_path):
    words = [*FASTAI_1, *WORDS[9:-1], "film"]  # "film" twice: the later row counts
    model = language_model(vocab=len(words))
    torch.nn.init.normal_(model[1].decoder.bias)
    return files.published(tmp_path / "wt103-fwd.tgz", model, words)


def state_on_cpu(result):
    return {key: tensor.cpu() for key, tensor in result.model.state_dict().items()}


def test_fine_tuning_gives_a_decoder_without_bias_one(tmp_path):
    model = uf.LanguageModel(language_model()[0], bias=False)
    uf.save_checkpoint(tmp_path / "lm.pth", model, "fastai", tokens=WORDS)
    lm = uf.finetune_lm(tmp_path / "lm.pth", TEXTS, tmp_path / "a", **STILL)  # with the words beside it
    assert not lm.model[1].decoder.bias.any()


def test_fine_tuning_begins_with_the_checkpoint(archive, tmp_path, capsys):
    found = uf.load_checkpoint(archive)
    lm = uf.finetune_lm(archive, TEXTS, tmp_path / "a", **STILL | dict(progress="lines"))
    itos = lm.tokenizer.itos
    assert tuple(itos[:9]) == SPECIALS and itos.count("film") == 1 and "superb" in itos
    begun = state_on_cpu(lm)
    assert all(torch.equal(begun[key], t) for key, t in found.with_tokens(itos).state.items())
    old = found.state["0.encoder.weight"]
    assert torch.equal(begun["0.encoder.weight"][itos.index("film")], old[-1])
    assert torch.equal(begun["0.encoder.weight"][itos.index("xxmaj")], old[5])
    torch.testing.assert_close(
        begun["1.decoder.bias"][itos.index("superb")], found.state["1.decoder.bias"].mean()
    )
    record = json.loads((tmp_path / "a" / "config.json").read_text())
    known = len(set(found.tokens) & set(itos))
    assert record["vocabulary"] == {"words": len(itos), "known": known}
    assert record["model"] == {"emb_sz": 6, "n_hid": 10, "n_layers": 2} and record["preset"] == "tiny"
    assert f"{known} of {len(itos)} words are known to {archive}" in capsys.readouterr().err
    for start in (str(archive), archive.as_uri(), found):
        again = uf.finetune_lm(start, TEXTS, tmp_path / "b", **STILL, overwrite=True)
        assert all(torch.equal(begun[key], t) for key, t in state_on_cpu(again).items())
    clf = uf.train_classifier(tmp_path / "a", TEXTS, LABELS, tmp_path / "c", **TINY)
    assert set(clf.predict(TEXTS)) <= {"good", "bad"}


def test_a_classifier_begins_with_the_checkpoint(archive, tmp_path):
    clf = uf.train_classifier(archive, TEXTS, LABELS, tmp_path / "a", **STILL)
    assert clf.tokenizer.itos == own_vocab(WORDS)
    moved = uf.load_checkpoint(archive).with_tokens(clf.tokenizer.itos)
    wanted = moved.encoder().state_dict()
    assert all(torch.equal(t.cpu(), wanted[key]) for key, t in clf.model[0].module.state_dict().items())
    scratch = uf.train_classifier(archive, TEXTS, LABELS, tmp_path / "b", from_scratch=True, **STILL)
    assert scratch.tokenizer.itos == clf.tokenizer.itos and scratch.model[0].module.n_hid == 10
    uf.save_checkpoint(tmp_path / "encoder", moved.encoder(), tokens=moved.tokens)
    third = uf.train_classifier(tmp_path / "encoder", TEXTS, LABELS, tmp_path / "c", **STILL)
    assert all(torch.equal(t.cpu(), wanted[key]) for key, t in third.model[0].module.state_dict().items())
    # a classifier's file: its batch norm counts its steps in a tensor without dimensions
    uf.save_checkpoint(tmp_path / "classifier", clf.model, tokens=clf.tokenizer.itos)
    fourth = uf.train_classifier(tmp_path / "classifier", TEXTS, LABELS, tmp_path / "d", **STILL)
    assert all(torch.equal(t.cpu(), wanted[key]) for key, t in fourth.model[0].module.state_dict().items())


def test_markers_of_fastai_07_and_salesforce(tmp_path):
    words = ["_unk_", "_pad_", "t_up", "film", "<eos>", "xbos"]
    model = language_model(vocab=6)
    (tmp_path / "fwd_wt103.h5").write_bytes(
        files.packed(files.as_fastai_07(model.state_dict()), zipped=False)
    )
    found = uf.load_checkpoint(tmp_path / "fwd_wt103.h5", tokens=words)
    lm = uf.finetune_lm(found, TEXTS, tmp_path / "out", **STILL)
    begun, old = state_on_cpu(lm)["0.encoder.weight"], found.state["0.encoder.weight"]
    for ours, row in (("xxunk", 0), ("xxpad", 1), ("xxup", 2), ("film", 3), ("xxeos", 4), ("xxbos", 5)):
        assert torch.equal(begun[lm.tokenizer.itos.index(ours)], old[row])
    assert lm.tokenizer.itos[9] == "film"


def test_what_no_stage_can_start_from(archive, tmp_path):
    def refused(start, message, stage=uf.finetune_lm, **more):
        with pytest.raises(ValueError, match=message):
            stage(start, TEXTS, out=tmp_path / "x", **TINY, **more)
        assert not (tmp_path / "x").exists()

    lm, encoder = language_model(), language_model()[0]
    for name, model, options in (
        ("wordless", lm, {}),
        ("encoder", encoder, dict(tokens=WORDS)),
        ("bidir", language_model(bidir=True), dict(tokens=WORDS)),
    ):
        uf.save_checkpoint(tmp_path / name, model, **options)
    refused(tmp_path / "wordless", "base_run='.*wordless' does not say its words: give load_checkpoint")
    refused(tmp_path / "encoder", "encoder' must be a language model's, it is of kind 'encoder'")
    refused(tmp_path / "bidir", "bidir' is bidirectional; the stages train in one direction")
    refused(tmp_path / "bidir", "lm_run=.*bidirectional", uf.train_classifier, labels=LABELS)
    (tmp_path / "cut.tgz").write_bytes(archive.read_bytes()[:500])
    refused(tmp_path / "cut.tgz", "cut.tgz is not a complete archive")


def test_command_line(archive, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    out = str(tmp_path / "out")
    options = ["--preset", "tiny", "--epochs", "1", "--batch-size", "4", "--device", str(DEVICE)]
    assert main(["finetune", str(archive), str(tmp_path / "t.txt"), "--out", out, *options]) == 0
    assert "words are known to" in capsys.readouterr().err
    assert uf.load(out).model[0].n_hid == 10
    assert main(["finetune", str(tmp_path / "t.txt"), str(tmp_path / "t.txt"), "--out", out + "2"]) == 2
    assert "t.txt is no torch file, no safetensors file and no gzipped archive" in capsys.readouterr().err
