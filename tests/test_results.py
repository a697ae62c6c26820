"""What a run gives back: perplexity, generated text, predictions."""

import concurrent.futures
import inspect
import math
import shutil
import typing

import numpy as np
import pytest
import torch
from checks import DEVICE
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast.results import build_lm, stream_loss

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "general"
    return uf.pretrain_lm(TEXTS, out, **TINY | SIZES | dict(lr=0.03))


@pytest.fixture(scope="module")
def clf(base):
    options = TINY | dict(
        epochs=12, batch_size=16, drop_mult=0.0, discriminative=1.0
    )  # so few units want no dropout
    return uf.train_classifier(base, *sentences(200), base.path.parent / "clf", **options)


def test_perplexity_is_the_exact_token_mean(base):
    ids = torch.from_numpy(np.concatenate(base.tokenizer.encode(TEXTS[:7]))).long().to(DEVICE)
    base.model.reset()
    with torch.no_grad():
        logits = base.model(ids[None, :-1])[0].double()
    wanted = math.exp(torch.nn.functional.cross_entropy(logits, ids[1:]))
    assert base.perplexity(TEXTS[:7], batch_size=1) == pytest.approx(wanted, rel=1e-5)
    assert base.perplexity(TEXTS[:7], batch_size=1) == base.perplexity(TEXTS[:7], batch_size=1)
    assert base.perplexity(TEXTS, batch_size=3) == pytest.approx(
        base.perplexity(TEXTS, batch_size=1), rel=0.2
    )
    assert not base.model.training


def test_generate(base):
    said = base.generate("The film", 12, seed=1)
    assert said == base.generate("The film", 12, seed=1) != base.generate("The film", 12, seed=2)
    assert said.lower().startswith("the film") and base.generate("The film", 0) == "The film"
    assert base.generate("The", 5, temperature=0) == base.generate("The", 5, temperature=0, seed=9)


@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_generate_refuses_a_seed(base, seed):
    with pytest.raises(TypeError, match="seed must be None or an int"):
        base.generate("The", 2, seed=seed)


def test_numbers_of_numpy_and_tiny_temperatures(base):
    assert base.generate("The", 5, seed=np.int64(1)) == base.generate("The", 5, seed=1)
    said = base.generate("The", np.int64(5), temperature=np.float32(1), seed=1)
    assert said == base.generate("The", 5, temperature=1.0, seed=1)
    assert base.generate("The", 5, temperature=1e-320) == base.generate("The", 5, temperature=0)
    assert base.perplexity(TEXTS[:9], np.int64(2)) == base.perplexity(TEXTS[:9], 2)


def test_threads_share_a_language_model(base):
    prompts = ["The film", "The song was", "A", "great"]
    wanted = [base.generate(prompt, 60, seed=3) for prompt in prompts], base.perplexity(TEXTS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        said = [pool.submit(base.generate, prompt, 60, seed=3) for prompt in prompts * 4]
        figures = [pool.submit(base.perplexity, TEXTS) for _ in range(4)]
        assert [s.result() for s in said] == wanted[0] * 4
        assert {f.result() for f in figures} == {wanted[1]}


def test_validation_leaves_the_state_of_training(base):
    model = build_lm(base.config.model_config(), len(base.tokenizer), base.config.dropouts()).to(DEVICE)
    model(torch.zeros(5, 3, dtype=torch.int64, device=DEVICE))
    before = [tensor.clone() for layer in model[0].hidden for tensor in layer]
    stream_loss(model, base.tokenizer.encode(TEXTS), 16, 8)
    after = [tensor for layer in model[0].hidden for tensor in layer]
    assert model.training and model[0].bs == 5
    assert all(map(torch.equal, before, after))


def test_perplexity_reads_files_as_the_stages_do(base, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    for sources in (tmp_path / "a.txt", [str(tmp_path / "a.txt")]):
        assert base.perplexity(sources) == base.perplexity(TEXTS)


def test_a_result_outlives_a_change_of_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.path.parent)
    lm = uf.load(base.path.name, DEVICE)
    monkeypatch.chdir(tmp_path)
    assert uf.finetune_lm(lm, TEXTS, tmp_path / "x", **TINY | dict(epochs=1)).metrics


def test_a_result_whose_folder_is_gone_says_what_to_do(base, tmp_path):
    lm = uf.load(shutil.copytree(base.path, tmp_path / "lm"), DEVICE)
    (tmp_path / "lm").rename(tmp_path / "moved")
    assert lm.perplexity(TEXTS) == base.perplexity(TEXTS)
    one = TINY | dict(epochs=1)
    with pytest.raises(FileNotFoundError, match="base_run is the run in '.*lm', which is not there: give"):
        uf.finetune_lm(lm, TEXTS, tmp_path / "x", **one)
    lm.path = None
    with pytest.raises(FileNotFoundError, match="lm_run has no run directory: give .* save_checkpoint"):
        uf.train_classifier(lm, TEXTS, LABELS, tmp_path / "x", **one)
    uf.save_checkpoint(tmp_path / "file", lm)
    assert uf.finetune_lm(tmp_path / "file", TEXTS, tmp_path / "x", **one).metrics


def test_predictions_do_not_depend_on_order_or_batch(clf):
    texts = [
        "The film was superb and fine .",
        "The song was awful and dull .",
        "",
        "dull and poor " * 40,
        "lovely",
    ]
    whole = clf.predict_proba(texts, batch_size=2)
    assert whole.shape == (5, 2) and whole.dtype == np.float32 and np.allclose(whole.sum(1), 1, atol=1e-6)
    assert np.allclose(whole, clf.predict_proba(texts[::-1])[::-1], atol=1e-5)
    assert np.allclose(whole, np.concatenate([clf.predict_proba([t]) for t in texts]), atol=1e-5)
    assert clf.predict(texts) == [clf.classes[i] for i in whole.argmax(1)]
    assert clf.predict([]) == [] and clf.predict_proba([]).shape == (0, 2)
    assert clf.accuracy(texts[:2], ["good", "bad"]) == 1.0


def test_the_mode_of_each_module_stays(clf):
    inner = clf.model[0].module.train()
    clf.predict(TEXTS[:2])
    try:
        assert inner.training and inner.rnns[0].training and not clf.model.training
    finally:
        clf.model.eval()


@pytest.fixture(params=["dtype", "device"])
def another_default(request):
    if request.param == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def test_predictions_do_not_ask_for_torchs_defaults(clf, another_default):
    wanted = clf.predict_proba(TEXTS[:3])
    assert wanted.dtype == np.float32 and wanted.shape == (3, 2)
    clf.model(torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), [3, 1])
    clf.model(torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), torch.tensor([3, 1], device="cpu"))


def test_public_functions_say_their_types():
    functions = [uf.pretrain_lm, uf.finetune_lm, uf.train_classifier, uf.load]
    functions += [uf.results.TrainedLM.perplexity, uf.results.TrainedLM.generate]
    functions += [
        getattr(uf.results.TrainedClassifier, name) for name in ("predict", "predict_proba", "accuracy")
    ]
    for function in functions:
        hints = typing.get_type_hints(function)
        assert {*inspect.signature(function).parameters} - {"self"} <= hints.keys() and "return" in hints
