"""Backward models: texts are reversed whole, and the direction follows the model."""

import json
import math
import shutil

import foreign_files as files
import numpy as np
import pytest
import torch
from checks import DEVICE
from foreign_files import WORDS, language_model
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import runs
from ulmfit_fast.cli import main
from ulmfit_fast.initial import starting_point
from ulmfit_fast.pretrained import names_backwards
from ulmfit_fast.text import BOS_ID, PAD_ID, UNK_ID, Tokenizer, join_tokens

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(40)
ONE = TINY | dict(epochs=1)
BASE = TINY | SIZES | dict(epochs=3, lr=0.03)
SHORT = TINY | dict(max_len=5, bptt=4)  # most texts are longer


def three_stages(folder, **direction):
    """[general, target, clf], each validated, from a model of one direction."""
    general = uf.pretrain_lm(TEXTS, folder / "general", valid=TEXTS[:9], **BASE, **direction)
    target = uf.finetune_lm(general, ["a zebra"] * 3 + TEXTS, folder / "target", valid=TEXTS[:9], **ONE)
    valid = TEXTS[:9], LABELS[:9]
    return [general, target, uf.train_classifier(target, TEXTS, LABELS, folder / "clf", valid=valid, **SHORT)]


@pytest.fixture(scope="module")
def backward(tmp_path_factory):
    return three_stages(tmp_path_factory.mktemp("backward"), backwards=True)


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    return three_stages(tmp_path_factory.mktemp("forward"))


def numbers(result):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in result.history]


def same_weights(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


def without_direction(path):
    """Makes config.json that of a version which knew one direction."""
    record = json.loads((path / "config.json").read_text())
    del record["backwards"]
    record["config"].pop("backwards", None)
    (path / "config.json").write_text(json.dumps(record))


def test_texts_are_reversed_whole(monkeypatch):
    ours, other = Tokenizer.train(TEXTS, 100, 1, backwards=True), Tokenizer.train(TEXTS, 100, 1)
    monkeypatch.setattr("ulmfit_fast.text._AT_ONCE", 100)
    texts = [*TEXTS, "", "The unseen film!!!!"]
    for text, ids, straight in zip(texts, ours.encode(texts), other.encode(texts), strict=True):
        assert ids.tolist() == list(reversed(straight.tolist())) and ids[-1] == BOS_ID
        assert (
            ids.dtype == np.int32 and torch.from_numpy(ids).shape == ids.shape
        )  # torch takes no negative step
        assert ours.decode(ids) == other.decode(straight)
        assert ours.tokens(text) == other.tokens(text)


@pytest.mark.parametrize("is_lm", [True, False])
def test_texts_are_reversed_as_fastai_does(is_lm):
    data = pytest.importorskip("fastai.text.data")
    ours = Tokenizer.train(TEXTS[:20], 20, 1, backwards=True)
    steps = data.TextBlock(ours.tokens, ours.itos, is_lm=is_lm, backwards=True).type_tfms
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        for step in steps:
            text = step(text)
        assert text.tolist() == ids.tolist()


def test_every_stage_is_a_forward_one_on_texts_reversed_by_hand(backward, forward, tmp_path, monkeypatch):
    """To the bit, with validation, predictions, and gradients through max_len tokens of a document."""
    straight = Tokenizer.encode

    def reversed_by_hand(self, texts, argument="texts"):
        return [np.array(list(reversed(ids.tolist())), np.int32) for ids in straight(self, texts, argument)]

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", reversed_by_hand)
        by_hand = three_stages(tmp_path)
        perplexity, shares = by_hand[1].perplexity(TEXTS), by_hand[2].predict_proba(TEXTS)
    for ours, wanted, other in zip(backward, by_hand, forward, strict=True):
        assert same_weights(ours, wanted) and not same_weights(ours, other)
        assert numbers(ours) == numbers(wanted)
        assert ours.tokenizer.itos == wanted.tokenizer.itos
    assert backward[1].perplexity(TEXTS) == perplexity
    assert np.array_equal(backward[2].predict_proba(TEXTS), shares)


def test_the_direction_follows_the_model(backward, forward):
    for stages, wanted in ((backward, True), (forward, False)):
        for result in stages:
            again = uf.load(result.path, DEVICE)
            assert result.backwards is again.backwards is wanted
            assert ("backwards, on" in repr(again)) == wanted
            assert runs.read_config(result.path)["backwards"] is wanted
        assert json.loads((stages[0].path / "config.json").read_text())["config"]["backwards"] is wanted
        assert uf.load(stages[1].path, DEVICE).perplexity(TEXTS) == stages[1].perplexity(TEXTS)
        assert np.array_equal(
            uf.load(stages[2].path, DEVICE).predict_proba(TEXTS), stages[2].predict_proba(TEXTS)
        )


def test_perplexity_is_that_of_the_reversed_texts(backward):
    lm = backward[0]
    words = [["xxbos", *lm.tokenizer.tokens(text)[1:]][::-1] for text in TEXTS[:7]]
    ids = torch.tensor([lm.tokenizer.stoi[word] for text in words for word in text], device=DEVICE)
    lm.model.reset()
    with torch.no_grad():
        logits = lm.model(ids[None, :-1])[0].double()
    wanted = math.exp(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert lm.perplexity(TEXTS[:7], batch_size=1) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("prompt", ["", "and superb .", "The"])
def test_generate_continues_to_the_left(backward, prompt):
    lm = backward[0]
    prompted = [lm.tokenizer.stoi[word] for word in lm.tokenizer.tokens(prompt)[1:]]
    ids = [BOS_ID, *reversed(prompted)]
    for _ in range(6):
        lm.model.reset()
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids], device=DEVICE))[0, -1]
        logits[[UNK_ID, PAD_ID]] = -math.inf
        ids.append(int(logits.argmax()))
    said = lm.generate(prompt, 6, temperature=0)
    assert said == join_tokens([lm.tokenizer.itos[i] for i in reversed(ids)])
    assert lm.generate(prompt, 0) == join_tokens(lm.tokenizer.tokens(prompt))
    assert said.endswith(join_tokens(lm.tokenizer.tokens(prompt)))


def test_a_text_is_generated_from_its_end(tmp_path):
    options = BASE | dict(epochs=8, drop_mult=0.0)
    backward = uf.pretrain_lm(TEXTS, tmp_path / "b", backwards=True, **options)
    assert backward.generate("", 1, temperature=0) == "."  # with which every text ends
    assert uf.pretrain_lm(TEXTS, tmp_path / "f", **options).generate("", 2, temperature=0) == "The"


def test_runs_that_do_not_say_their_direction_are_forward_ones(forward, tmp_path):
    three_stages(tmp_path)
    for name, result in zip(("general", "target", "clf"), forward, strict=True):
        without_direction(tmp_path / name)
        again = uf.load(tmp_path / name, DEVICE)
        assert again.backwards is False and same_weights(again, result)
    assert uf.load_checkpoint(tmp_path / "general").backwards is False
    again = uf.pretrain_lm(TEXTS, tmp_path / "general", valid=TEXTS[:9], resume=True, **BASE)
    assert same_weights(again, forward[0])
    assert not uf.finetune_lm(tmp_path / "general", TEXTS, tmp_path / "b", **ONE).backwards


def test_resume_goes_on_in_the_same_direction_alone(backward, forward, tmp_path):
    def stop(line):
        if line["step"] == 12:
            raise KeyboardInterrupt

    out, options = tmp_path / "x", BASE | dict(valid=TEXTS[:9])
    with pytest.raises(KeyboardInterrupt):
        uf.pretrain_lm(TEXTS, out, callback=stop, backwards=True, **options)
    with pytest.raises(ValueError, match=r"changed: backwards=False \(was True\)"):
        uf.pretrain_lm(TEXTS, out, resume=True, **options)
    resumed = uf.pretrain_lm(TEXTS, out, resume=True, backwards=True, **options)
    assert same_weights(resumed, backward[0]) and numbers(resumed) == numbers(backward[0])
    clf = uf.train_classifier(None, TEXTS, LABELS, tmp_path / "clf", backwards=True, **ONE)
    assert clf.backwards and uf.load(clf.path, DEVICE).backwards
    with pytest.raises(ValueError, match=r"changed: backwards=False \(was True\)"):
        uf.train_classifier(None, TEXTS, LABELS, clf.path, resume=True, **ONE)
    with pytest.raises(ValueError, match=r"changed: backwards=False \(was True\)"):
        uf.finetune_lm(forward[0], TEXTS, backward[1].path, resume=True, **ONE)


@pytest.mark.parametrize(
    ("name", "said", "wanted"),
    [
        ("wt103-bwd.tgz", None, True),
        ("de_BWD.tgz", None, True),
        ("wt103-fwd.tgz", None, False),
        ("wiki.tgz", None, False),
        ("wiki.tgz", True, True),
        ("bwd.tgz", None, True),
        ("wt103-bwd.tgz", False, False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_direction_of_a_checkpoint(tmp_path, capsys, name, said, wanted):
    archive = files.published(tmp_path / name, language_model())
    assert uf.load_checkpoint(archive).backwards is None
    for start in (archive, archive.as_uri(), uf.load_checkpoint(archive)):
        assert starting_point(start, "base_run", said)[0].backwards is wanted
    lm = uf.finetune_lm(archive, TEXTS, tmp_path / "a", backwards=said, **ONE | dict(progress="lines"))
    assert lm.backwards is uf.load(lm.path, DEVICE).backwards is wanted
    assert f"{name}, which reads {'backwards' if wanted else 'forwards'}" in capsys.readouterr().err
    again = uf.finetune_lm(lm, TEXTS, tmp_path / "b-bwd", **ONE)  # whatever the run is called
    clf = uf.train_classifier(archive, TEXTS, LABELS, tmp_path / "c", backwards=said, **ONE)
    assert (
        again.backwards
        is uf.train_classifier(again, TEXTS, LABELS, tmp_path / "d", **ONE).backwards
        is wanted
    )
    assert clf.backwards is wanted


def test_own_files_say_their_direction(backward, forward, tmp_path):
    for result in (*backward, *forward):
        uf.save_checkpoint(tmp_path / "lm", result)
        found = uf.load_checkpoint(tmp_path / "lm")
        assert found.backwards is uf.load_checkpoint(result.path).backwards is result.backwards
        uf.save_checkpoint(tmp_path / "again", found.with_tokens(found.tokens))
        assert uf.load_checkpoint(tmp_path / "again").backwards is result.backwards
        path = tmp_path / f"a_{'bwd' if result.backwards else 'fwd'}.pth"
        uf.save_checkpoint(path, result, "fastai")
        assert uf.load_checkpoint(path).backwards is None
    uf.save_checkpoint(tmp_path / "a_bwd.pth", backward[0], "fastai")
    assert uf.finetune_lm(tmp_path / "a_bwd.pth", TEXTS, tmp_path / "x", **ONE).backwards
    uf.save_checkpoint(tmp_path / "no_run", language_model(), tokens=np.array(WORDS))
    assert uf.load_checkpoint(tmp_path / "no_run").backwards is None
    found = uf.load_checkpoint(tmp_path / "a_bwd.pth")
    uf.save_checkpoint(tmp_path / "converted", found)  # what the name said is said by the file from here on
    assert uf.load_checkpoint(tmp_path / "converted").backwards is True


@pytest.mark.parametrize("stage", [0, 2])
def test_a_name_that_tells_the_other_direction(backward, forward, tmp_path, stage):
    for result, name, way in (
        (backward[stage], "a.pth", "backwards"),
        (forward[stage], "a_bwd.pth", "forwards"),
    ):
        with pytest.warns(UserWarning, match=f"the model reads {way}, .* got path=.*{name}"):
            uf.save_checkpoint(tmp_path / name, result, "fastai")


def test_the_name_in_an_address():
    for name in ("lm_bwd.pth", "lm_bwd.pth?sig=a/b", "lm-bwd.tgz#x/y", "a/lm_BWD.pth?v=fwd"):
        assert names_backwards(f"https://host/ck/{name}")
    for name in ("lm.pth?v=bwd", "bwd/lm.pth", "lm-fwd.tgz#bwd"):
        assert not names_backwards(f"https://host/ck/{name}")
    assert names_backwards("x/lm#1_bwd.pth") and not names_backwards(r"bwd/lm.pth")


def test_a_classifier_from_scratch_has_a_direction_of_its_own(forward, tmp_path, capsys):
    options = ONE | dict(progress="lines")
    clf = uf.train_classifier(
        forward[0], TEXTS, LABELS, tmp_path / "a", from_scratch=True, backwards=True, **options
    )
    assert clf.backwards and clf.tokenizer.itos == forward[0].tokenizer.itos
    assert "the classifier from scratch reads backwards" in capsys.readouterr().err
    assert not uf.train_classifier(
        forward[0], TEXTS, LABELS, tmp_path / "b", from_scratch=True, **ONE
    ).backwards


def test_directions_that_are_refused(backward, forward, tmp_path):
    uf.save_checkpoint(tmp_path / "lm_fwd", backward[0])
    own = uf.load_checkpoint(tmp_path / "lm_fwd")
    backward_starts = backward[0], backward[0].path, uf.load_checkpoint(backward[0].path), own, own.source
    cases = [(start, False, "backwards") for start in backward_starts] + [(forward[1], True, "forwards")]
    for start, said, way in cases:
        allowed = f"leave it out, or give {not said}"
        with pytest.raises(
            ValueError, match=f"backwards={said} contradicts base_run=.*reads {way}.*{allowed}"
        ):
            uf.finetune_lm(start, TEXTS, tmp_path / "x", backwards=said, **ONE)
        with pytest.raises(ValueError, match=f"backwards={said} contradicts lm_run=.*reads {way}"):
            uf.train_classifier(start, TEXTS, LABELS, tmp_path / "x", backwards=said, **ONE)
        assert uf.finetune_lm(start, TEXTS, tmp_path / "y", backwards=not said, overwrite=True, **ONE)
    for call in (
        lambda: uf.finetune_lm(forward[0], TEXTS, tmp_path / "x", backwards="no", **ONE),
        lambda: uf.train_classifier(None, TEXTS, LABELS, tmp_path / "x", backwards="no", **ONE),
    ):
        with pytest.raises(TypeError, match=r"backwards must be True, False or None, got 'no' \(str\)"):
            call()
    shutil.copytree(forward[0].path, tmp_path / "wrong")
    config = tmp_path / "wrong" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"backwards": 1}))
    with pytest.raises(ValueError, match="config.json' does not .* backwards must be true or false, got 1"):
        uf.load(tmp_path / "wrong")
    with pytest.raises(TypeError, match="PretrainConfig.backwards must be bool, got 1"):
        uf.pretrain_lm(TEXTS, tmp_path / "x", backwards=1, **ONE)
    with pytest.raises(ValueError, match="says backwards='no'; true and false are allowed"):
        uf.pretrained.Checkpoint("file", "torch", own.state, backwards="no")
    with pytest.raises(ValueError, match="says backwards=1; true and false are allowed"):
        uf.pretrained.Checkpoint("file", "torch", own.state, backwards=1)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"backwards": True}))
    with pytest.raises(ValueError, match="backwards is True, and False in config"):
        uf.load(tmp_path / "wrong")
    assert not (tmp_path / "x").exists()


def test_command_line(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    (tmp_path / "t.csv").write_text("text,label\n" + rows, encoding="utf-8")
    text, csv, on = str(tmp_path / "t.txt"), str(tmp_path / "t.csv"), ["--device", str(DEVICE)]
    brief = ["--preset", "tiny", "--epochs", "1", "--batch-size", "4", "--quiet", *on]
    sizes = ["--emb-sz", "12", "--n-hid", "16", "--n-layers", "2"]
    archive = str(files.published(tmp_path / "wiki.tgz", language_model()))
    for name, line in (
        ("lm", ["pretrain", text, "--backwards", "true", *sizes]),
        ("tuned", ["finetune", str(tmp_path / "lm"), text]),
        ("clf", ["classify", str(tmp_path / "tuned"), csv]),
        ("known", ["finetune", archive, text, "--backwards", "true"]),
        ("scratch", ["classify", "-", csv, "--backwards", "true"]),
    ):
        assert main([*line, "--out", str(tmp_path / name), *brief]) == 0
        assert uf.load(tmp_path / name).backwards
    line = ["finetune", str(tmp_path / "lm"), text, "--out", str(tmp_path / "x"), "--backwards", "false"]
    assert main([*line, *brief]) == 2
    assert "error: backwards=False contradicts base_run=" in capsys.readouterr().err
