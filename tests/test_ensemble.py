"""ClassifierEnsemble: the mean of the classifiers' probabilities, in Python and on the command line."""

import json

import numpy as np
import pytest
from checks import DEVICE
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast.cli import main

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences(40)
ONE = TINY | dict(epochs=1)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return uf.pretrain_lm(TEXTS, tmp_path_factory.mktemp("runs") / "lm", **ONE | SIZES)


@pytest.fixture(scope="module")
def forward(lm):
    return uf.train_classifier(lm, TEXTS, LABELS, lm.path.parent / "clf", **TINY)


@pytest.fixture(scope="module")
def backward(lm):
    """Of other sizes, too."""
    return uf.train_classifier(None, TEXTS, LABELS, lm.path.parent / "back", backwards=True, **TINY)


def test_an_ensemble_gives_the_mean(backward, forward):
    members = [forward, backward, uf.load(forward.path, DEVICE)]
    texts = [*TEXTS[:11], ""]
    for few in (members[:1], members[:2], members):
        both = uf.ClassifierEnsemble(each for each in few)
        wanted = sum(np.float64(each.predict_proba(texts)) for each in few) / len(few)
        shares = both.predict_proba(iter(texts), batch_size=5)
        assert shares.shape == (12, 2) and shares.dtype == np.float32 and both.classes == ["bad", "good"]
        np.testing.assert_allclose(shares, wanted, rtol=0, atol=1e-5)
        assert both.predict(texts) == [both.classes[i] for i in wanted.argmax(1)]
        hits = [p == t for p, t in zip(both.predict(TEXTS), LABELS, strict=True)]
        assert both.accuracy(TEXTS, LABELS) == np.mean(hits)
    assert not np.allclose(members[0].predict_proba(texts), members[1].predict_proba(texts), atol=1e-4)
    assert both.predict([]) == [] and both.predict_proba([]).shape == (0, 2)


def test_ensembles_that_are_refused(backward, lm, tmp_path):
    clf = backward
    other = uf.train_classifier(None, TEXTS, ["fine", "bad"] * 20, tmp_path / "x", **ONE)
    for classifiers, error, message in (
        ([], ValueError, "classifiers is empty: at least one TrainedClassifier"),
        ("runs/clf", TypeError, "classifiers must be a list of TrainedClassifiers, got one str: 'runs/clf'"),
        (clf, TypeError, "classifiers must be a list of TrainedClassifiers, got TrainedClassifier"),
        ([clf, lm], TypeError, r"classifiers\[1\] must be a TrainedClassifier, .* got TrainedLM\("),
        ({"a": clf}, TypeError, "classifiers must be a list of TrainedClassifiers, got a dict$"),
        (["runs/clf"], TypeError, r"classifiers\[0\] must be a TrainedClassifier, .* got 'runs/clf'"),
        (
            [clf, clf, other],
            ValueError,
            r"\[0\] has \['bad', 'good'\] and .*\[2\] \(.*x\) has \['bad', 'fine'\]",
        ),
    ):
        with pytest.raises(error, match=message):
            uf.ClassifierEnsemble(classifiers)
    for call in (lambda both: both.predict("a text"), lambda both: both.predict_proba([1])):
        with pytest.raises(TypeError, match="texts"):
            call(uf.ClassifierEnsemble([clf]))
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        uf.ClassifierEnsemble([clf]).predict(TEXTS, batch_size=0)
    with pytest.raises(ValueError, match="labels has the label 'fine'"):
        uf.ClassifierEnsemble([clf]).accuracy(TEXTS, ["fine"] * 40)


def test_predict_on_the_command_line(forward, backward, lm, capsys):
    first, second, on = str(forward.path), str(backward.path), ["--device", str(DEVICE)]
    assert main(["predict", first, "--average", second, "--proba", TEXTS[0], *on]) == 0
    shares = json.loads(capsys.readouterr().out)
    both = uf.ClassifierEnsemble([forward, backward])
    assert list(shares.values()) == pytest.approx(both.predict_proba(TEXTS[:1])[0].tolist(), abs=2e-6)
    assert main(["predict", first, "--average", second, "--average", first, TEXTS[0], *on]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("good", "bad")
    assert main(["predict", first, "--average", str(lm.path), TEXTS[0], *on]) == 2
    said = capsys.readouterr().err
    assert "--average needs classifiers, but" in said and str(lm.path) in said and len(said.splitlines()) == 1
    assert main(["predict", first, "--average", second, second, TEXTS[0], *on]) == 2
    assert "is a run, not a text: give --average once for each run" in capsys.readouterr().err
