"""The demo in small, and the stock model it compares with."""

import pytest
import torch
from checks import DEVICE
from stages import sentences

from ulmfit_fast import demo, demo_text
from ulmfit_fast.config import ModelConfig
from ulmfit_fast.results import build_lm, load
from ulmfit_fast.stock import StockLanguageModel

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

NO_DROPOUT = dict(output_p=0.0, hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)


def test_demo_in_small(tmp_path, monkeypatch):
    texts, labels = sentences(80)
    monkeypatch.setattr(demo, "general_text", lambda: texts)
    monkeypatch.setattr(demo, "labelled_text", lambda: (texts, labels))
    said = []
    options = dict(progress=False, say=said.append, epochs=1, batch_size=4, min_freq=1, device=DEVICE)
    figures = demo.run_demo(tmp_path / "demo", **options)
    table = said[-1]
    assert max(len(line) for line in table.splitlines() if str(tmp_path) not in line) <= 80
    assert (
        figures["held_out"] == 16
        and figures["classes"] == ["bad", "good"]
        and figures["accuracy_majority"] == 0.5
    )
    assert figures["perplexity_after"] < figures["perplexity_before"]
    assert figures["tokens_per_s"] > 0 and figures["tokens_per_s_stock"] > 0
    for text in (
        "after stage 1",
        "after stage 2",
        "most frequent",
        "from scratch",
        "stock torch",
        "curves.png",
    ):
        assert text in table
    assert load(tmp_path / "demo" / "3-classifier", DEVICE).predict(["The film was fine"])[0] in labels
    demo.run_demo(tmp_path / "demo", **options)


def test_a_demo_that_is_stopped_says_that_it_starts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "general_text", lambda: sentences(80)[0])
    monkeypatch.setattr(demo, "labelled_text", lambda: sentences(80))

    def stop(line):
        raise KeyboardInterrupt

    options = dict(progress=False, say=str, epochs=1, batch_size=4, min_freq=1, device=DEVICE)
    with pytest.raises(KeyboardInterrupt, match=r"^the demo was stopped; it would start anew\."):
        demo.run_demo(tmp_path, callback=stop, **options)


@pytest.mark.cpu_only("text alone")
def test_text_of_this_installation():
    general = demo_text.general_text(max_words=5000)
    assert sum(len(t.split()) for t in general) >= 5000 and len(set(general)) == len(general)
    assert general == demo_text.general_text(max_words=5000)


@pytest.mark.cpu_only("text alone")
def test_labelled_text(monkeypatch):
    monkeypatch.setattr(demo_text, "PACKAGES", ("optim", "distributions", "no_such_package"))
    texts, labels = demo_text.labelled_text(most=50, max_words=30)
    assert sorted(set(labels)) == ["distributions", "optim"] and labels.count("optim") == 50
    assert all(8 <= len(t.split()) <= 30 for t in texts)
    (train, train_labels), (held, held_labels) = demo_text.split(texts, labels)
    assert len(held) == 20 and not set(train) & set(held) and held_labels.count("optim") == 10
    assert sorted(train + held) == sorted(texts) and len(train_labels) == len(train)


def test_the_stock_model_is_the_same_model():
    model = build_lm(ModelConfig(12, 16, 3), 50, NO_DROPOUT).to(DEVICE).double()
    twin = StockLanguageModel.like(model, **NO_DROPOUT).double()
    ids = torch.randint(50, (2, 4, 9), device=DEVICE)
    for window, targets in (ids, ids.flip(0)):  # the second call carries the state of the first
        ours, theirs = model(window, targets), twin(window, targets)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        ours[0].backward()
        theirs[0].backward()
    torch.testing.assert_close(model[0].encoder.weight.grad, twin.embedding.weight.grad)
    for mine, other in zip(model[0].rnns, twin.rnns, strict=True):
        torch.testing.assert_close(mine.weight_hh_l0_raw.grad, other.weight_hh_l0_raw.grad)


def test_the_stock_model_drops_weights():
    twin = StockLanguageModel(50, 12, 16, 3, **NO_DROPOUT | dict(weight_p=0.5)).to(DEVICE)
    ids = torch.randint(50, (4, 9), device=DEVICE)
    twin(ids, ids)[0].backward()
    used, raw = twin.rnns[0].module.weight_hh_l0, twin.rnns[0].weight_hh_l0_raw
    assert 0.3 < (used == 0).double().mean() < 0.7 and not raw.grad[used == 0].any()
