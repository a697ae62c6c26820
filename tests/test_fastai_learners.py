"""fastai's learners with our AWD_LSTM: the example that everyone starts from, and what learners can do."""

import contextlib
import functools
import http.server
import pickle
import tarfile
import threading
import warnings

import numpy as np
import pytest
import torch
from checks_fastai import (
    CLAS_CONFIG,
    LM_CONFIG,
    OURS,
    SIZES,
    THEIRS,
    classifier,
    lm_learner,
    reviews,
    write_reviews,
)
from fastai.text.all import (
    Callback,
    GradientAccumulation,
    Perplexity,
    RNNRegularizer,
    TextDataLoaders,
    accuracy,
    get_language_model,
    language_model_learner,
    load_learner,
    text_classifier_learner,
)
from fastai.text.models import core

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def lm_dls(path):
    return reviews(path, is_lm=True)


@pytest.fixture(scope="module")
def dls(path, lm_dls):
    return reviews(path, text_vocab=lm_dls.vocab)


@contextlib.contextmanager
def served(folder):
    """The address of a local server of `folder`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """An archive laid out as wt103-fwd.tgz, by a local server: (words of its vocabulary, its weights)."""
    words = ["xxunk", "xxpad", "xxbos", "xxmaj", "the", "movie", "film", "liked", "never", "."]
    torch.manual_seed(3)
    weights = get_language_model(THEIRS, len(words), LM_CONFIG).state_dict()
    folder = tmp_path / "files" / "wt103-fwd"
    folder.mkdir(parents=True)
    torch.save(weights, folder / "lstm_fwd.pth")
    (folder / "itos_wt103.pkl").write_bytes(pickle.dumps(words))
    with tarfile.open(folder.with_suffix(".tgz"), "w:gz") as archive:
        archive.add(folder, "wt103-fwd")
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    with served(folder.parent) as address:
        monkeypatch.setitem(core._model_meta[OURS], "url", f"{address}/wt103-fwd.tgz")
        yield words, weights


@pytest.mark.parametrize("pretrained", [False, True])
def test_the_example_that_everyone_starts_from(path, published, pretrained):
    # fastai's own lines, but for config, which makes the model small
    dls = TextDataLoaders.from_folder(path, valid="test")
    learn = text_classifier_learner(
        dls, OURS, drop_mult=0.5, metrics=accuracy, config=CLAS_CONFIG, pretrained=pretrained
    )
    if pretrained:
        words, weights = published
        rows, old = learn.model[0].module.encoder.weight, weights["0.encoder.weight"]
        assert torch.equal(rows[dls.vocab[0].index("movie")], old[words.index("movie")])
        torch.testing.assert_close(rows[dls.vocab[0].index("that")], old.mean(0))
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(4)
    assert np.isfinite(learn.recorder.losses).all() and len(learn.recorder.values) == 4
    label, index, probabilities = learn.predict("I really liked that movie!")
    assert label in ("neg", "pos") and dls.vocab[1][int(index)] == label
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_classifier_learns(dls):
    learn = classifier(dls, metrics=accuracy, drop_mult=0.1)
    with learn.no_logging():
        learn.fit_one_cycle(15, 5e-2)
    assert learn.recorder.losses[0] > 0.5 and learn.recorder.losses[-1] < 0.3
    assert learn.recorder.values[-1][-1] >= 0.75


def test_published_language_model(lm_dls, published):
    words, weights = published
    learn = language_model_learner(lm_dls, OURS, config=LM_CONFIG)
    assert not any(p.requires_grad for p in learn.model[0].rnns[0].parameters())  # load_pretrained freezes
    vocab = lm_dls.vocab
    for word in ("movie", "liked", "."):
        new, old = vocab.index(word), words.index(word)
        assert torch.equal(learn.model[0].encoder.weight[new], weights["0.encoder.weight"][old])
        assert learn.model[1].decoder.bias[new] == weights["1.decoder.bias"][old]
    for key in (f"0.rnns.{layer}.module.weight_ih_l0" for layer in range(SIZES["n_layers"])):
        assert torch.equal(learn.model.state_dict()[key], weights[key])


@pytest.mark.parametrize("saving, loading", [(OURS, OURS), (OURS, THEIRS), (THEIRS, OURS)])
def test_save_and_load_go_both_ways(lm_dls, tmp_path, saving, loading):
    """Weights and the optimizer's state, in the files of either architecture."""
    first, second = (lm_learner(lm_dls, arch, path=tmp_path) for arch in (saving, loading))
    with first.no_logging():
        first.fit_one_cycle(1, 1e-2)
    first.save("lm")
    second.load("lm", with_opt=True)
    for mine, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    states, others = (learn.opt.state_dict()["state"] for learn in (first, second))
    assert len(states) == len(others) == len(list(first.model.parameters()))
    for state, other in zip(states, others, strict=True):
        assert state.keys() == other.keys() and torch.equal(state["grad_avg"], other["grad_avg"])


@pytest.mark.parametrize("saving, loading", [(OURS, OURS), (OURS, THEIRS), (THEIRS, OURS)])
def test_encoders_go_both_ways(lm_dls, dls, tmp_path, saving, loading):
    lm, clas = lm_learner(lm_dls, saving, path=tmp_path), classifier(dls, loading, path=tmp_path)
    lm.save_encoder("encoder")
    clas.load_encoder("encoder")
    assert torch.equal(lm.model[0].encoder.weight, clas.model[0].module.encoder.weight)
    for mine, other in zip(lm.model[0].parameters(), clas.model[0].module.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert not any(p.requires_grad for p in clas.model[0].parameters())


def test_three_stages_by_fastais_names(lm_dls, dls, tmp_path):
    lm = lm_learner(lm_dls, path=tmp_path, metrics=[accuracy, Perplexity()])
    with lm.no_logging():
        lm.fit_one_cycle(2, 2e-2)
    assert lm.recorder.losses[-1] < lm.recorder.losses[0]
    lm.save_encoder("tuned")
    clas = classifier(dls, path=tmp_path, metrics=accuracy)
    clas.load_encoder("tuned")
    frozen = clas.model[0].module.rnns[0].weight_hh_l0_raw.clone()
    with clas.no_logging():
        clas.fit_one_cycle(1, 2e-2)
        assert torch.equal(clas.model[0].module.rnns[0].weight_hh_l0_raw, frozen)
        for depth in (-2, -3):
            clas.freeze_to(depth)
            trained = [any(p.requires_grad for p in group) for group in clas.opt.param_lists]
            assert trained == [False] * (len(trained) + depth) + [True] * -depth
            clas.fit_one_cycle(1, slice(1e-2 / 2.6**4, 1e-2))
        clas.unfreeze()
        clas.fit_one_cycle(1, slice(1e-3 / 2.6**4, 1e-3))
    assert not torch.equal(clas.model[0].module.rnns[0].weight_hh_l0_raw, frozen)


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_parameter_groups_are_fastais(make, lm_dls, dls):
    names = []
    for arch in (THEIRS, OURS):
        learn = make(lm_dls if make is lm_learner else dls, arch)
        learn.create_opt()
        name_of = {p: name for name, p in learn.model.named_parameters()}
        names.append([[name_of[p] for p in group] for group in learn.opt.param_lists])
    assert names[0] == names[1] and len(names[0]) == SIZES["n_layers"] + (1 if make is lm_learner else 2)


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_export_and_load_learner(make, lm_dls, dls, tmp_path):
    learn = make(lm_dls if make is lm_learner else dls, path=tmp_path)
    with learn.no_logging():
        learn.fit(1, 1e-2)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pickles run code
        loaded = load_learner(tmp_path / "export.pkl")
    x = (lm_dls if make is lm_learner else dls).valid.one_batch()[0]
    for each in (learn, loaded):
        each.model.eval()
        each.model.reset()
    assert type(loaded.model[0]) is type(learn.model[0])
    assert torch.equal(loaded.model(x)[0], learn.model(x)[0])
    if make is classifier:
        text = "I really liked that movie!"
        with loaded.no_bar():
            assert torch.equal(loaded.predict(text)[2], learn.predict(text)[2])


def test_language_model_writes(lm_dls):
    learn = lm_learner(lm_dls)
    with learn.no_bar():
        text = learn.predict("I really", n_words=7, no_bar=True)
    assert text.startswith("i really") and len(text.split()) >= 4


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_results_are_shown_as_fastais(make, lm_dls, dls, capsys):
    """Of a classifier fastai 2.8.12 shows none: it asks plum's dispatch for what that no longer has."""
    shown, weights = [], None
    for arch in (THEIRS, OURS):
        learn = make(lm_dls if make is lm_learner else dls, arch)
        weights = weights or learn.model.state_dict()
        learn.model.load_state_dict(weights)
        try:
            learn.show_results(max_n=2, shuffle=False)
            shown.append(capsys.readouterr().out)
        except TypeError as error:
            shown.append(str(error))
    assert shown[0] == shown[1]
    assert "xxbos" in shown[0] if make is lm_learner else shown[0]


@pytest.mark.parametrize("make", [lm_learner, classifier])
def test_lr_find_leaves_the_weights(make, lm_dls, dls, tmp_path):
    learn = make(lm_dls if make is lm_learner else dls, path=tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_logging():
        found = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 <= found.valley <= 10
    assert all(torch.equal(p, b) for p, b in zip(learn.model.parameters(), before, strict=True))


@pytest.mark.parametrize("to", ["to_fp16", "to_bf16"])
@pytest.mark.parametrize("make", [lm_learner, classifier])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_mixed_precision_by_fastais_names(to, make, lm_dls, dls):
    """fastai's autocast is CUDA's: on the CPU it trains in float32, with a warning of torch's."""
    learn = getattr(make(lm_dls if make is lm_learner else dls), to)()
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert np.isfinite(learn.recorder.losses).all()


def test_cpu_autocast_in_a_learner(lm_dls):
    """What to_bf16 stands for, on the CPU: the same loss to bfloat16's rounding."""
    x, y = lm_dls.train.one_batch()
    learn = lm_learner(lm_dls, drop_mult=0.0)
    losses = []
    for enabled in (False, True):
        learn.model.train()
        learn.model.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, raw, _ = learn.model(x)
        assert raw.dtype == (torch.bfloat16 if enabled else torch.float32)
        losses.append(learn.loss_func(logits.float(), y))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)


def test_activations_are_regularised(lm_dls):
    """RNNRegularizer adds alpha * mean(dropped**2) + beta * mean((h[t] - h[t-1])**2) to what is derived."""
    seen = []

    class Watch(Callback):
        order = RNNRegularizer.order + 1

        def after_loss(self):
            if self.training:
                raw, dropped = self.rnn.raw_out, self.rnn.out
                expected = 2 * dropped.pow(2).mean() + (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
                seen.append((self.learn.loss_grad - self.learn.loss, expected))

    learn = lm_learner(lm_dls, alpha=2.0, beta=1.0, cbs=Watch())
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert len(seen) == len(lm_dls.train)
    for added, expected in seen:
        torch.testing.assert_close(added.detach(), expected.detach(), rtol=1e-3, atol=1e-6)


def test_gradient_accumulation(lm_dls):
    """Of batches of 8, each step takes two: half as many steps, over the same batches."""
    learn = lm_learner(lm_dls, cbs=GradientAccumulation(16))
    with learn.no_logging():
        learn.fit(1, 1e-2)
    steps = {state["step"] for state in learn.opt.state_dict()["state"]}
    assert steps == {len(lm_dls.train) // 2} and len(learn.recorder.losses) == len(lm_dls.train)
