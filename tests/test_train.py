"""The three stages: that they learn, repeat to the bit, go on after an interruption, and lose nothing."""

import json
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from checks import DEVICE, random_state
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import batches, fitting, foreign, results, runs, text
from ulmfit_fast.model import layer_groups

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, LABELS = sentences()
BASE = TINY | SIZES | dict(epochs=4, lr=0.03)
KEYS = ("step", "epoch", "loss", "lr")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "general"
    return uf.pretrain_lm(TEXTS, out, valid=TEXTS[:10], **BASE)


@pytest.fixture(scope="module")
def clf(base):
    options = TINY | dict(
        epochs=12, batch_size=16, drop_mult=0.0, discriminative=1.0
    )  # so few units want no dropout
    return uf.train_classifier(
        base, *sentences(200), base.path.parent / "clf", valid=sentences(40, 1), **options
    )


def numbers(path, kind="train"):
    return [tuple(line.get(k) for k in KEYS) for line in runs.read_history(path) if line["kind"] == kind]


def test_run_directory(base):
    assert {p.name for p in base.path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "curves.png",
    }
    record = json.loads((base.path / "config.json").read_text())
    assert record["finished"] and record["stage"] == "pretrain" and record["config"]["lr"] == base.config.lr
    first = json.loads((base.path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"kind", "step", "epoch", "loss", "perplexity", "lr", "tokens_per_s"} == set(first)
    assert (base.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_stages_learn(base, clf, tmp_path):
    losses = [loss for _, _, loss, _ in numbers(base.path)]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    lm = uf.finetune_lm(
        base, ["a zebra and a zebra"] * 3 + TEXTS, tmp_path / "target", valid=TEXTS[:10], **TINY
    )
    valid = [line["perplexity"] for line in lm.history if line["kind"] == "valid"]
    assert valid[-1] < valid[0] and lm.history[0]["step"] == 0
    assert lm.tokenizer.itos[: len(base.tokenizer)] == base.tokenizer.itos and "zebra" in lm.tokenizer.stoi
    assert clf.metrics["valid_accuracy"] > 0.8 and clf.classes == ["bad", "good"]


def test_load_gives_the_same_model(base, clf):
    for result in (base, clf):
        again = uf.load(result.path, DEVICE)
        assert (
            type(again) is type(result) and again.config == result.config and again.metrics == result.metrics
        )
        for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert uf.load(base.path, DEVICE).perplexity(TEXTS) == base.perplexity(TEXTS)


def test_pretraining_starts_from_word_frequencies(base, tmp_path):
    words = np.concatenate(base.tokenizer.encode(TEXTS))
    share = (np.bincount(words, minlength=len(base.tokenizer)) + 1) / (len(words) + len(base.tokenizer))
    entropy = -np.log(share)[words].mean()
    out = uf.pretrain_lm(TEXTS, tmp_path / "x", **TINY | SIZES | dict(lr=0.0, epochs=1, alpha=0.0, beta=0.0))
    assert np.log(out.perplexity(TEXTS)) == pytest.approx(entropy, rel=0.02)


def test_same_seed_same_losses_and_the_callers_randomness_is_left_alone(base, tmp_path):
    torch.manual_seed(5)
    before = random_state()
    uf.pretrain_lm(TEXTS, tmp_path / "again", valid=TEXTS[:10], **BASE)
    assert torch.equal(before, random_state())
    assert numbers(tmp_path / "again") == numbers(base.path)
    uf.pretrain_lm(TEXTS, tmp_path / "other", **BASE, seed=1)
    assert numbers(tmp_path / "other") != numbers(base.path)


def interrupt_at(step):
    def callback(line):
        if line["kind"] == "train" and line["step"] == step:
            raise KeyboardInterrupt

    return callback


def stages(base):
    return {
        "pretrain": lambda out, **o: uf.pretrain_lm(TEXTS, out, **TINY | SIZES | {"valid": TEXTS[:10]} | o),
        "finetune": lambda out, **o: uf.finetune_lm(base, TEXTS, out, **TINY | {"valid": TEXTS[:10]} | o),
        "classify": lambda out, **o: uf.train_classifier(
            base, TEXTS, LABELS, out, **TINY | dict(gradual_unfreezing=True, discriminative=2.6) | o
        ),
    }


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "classify"])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(base, tmp_path, stage):
    run = stages(base)[stage]
    whole = run(tmp_path / "whole", log_every=2)
    epoch_end = max(line["step"] for line in whole.history if line["epoch"] == 1)
    for step in (2, epoch_end, epoch_end + 2 - epoch_end % 2):
        out = tmp_path / f"stopped-{step}"
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}.*resume"):
            run(out, log_every=2, callback=interrupt_at(step))
        assert (out / "state.pt").exists()
        resumed = run(out, log_every=2, resume=True)
        assert numbers(out) == numbers(tmp_path / "whole")
        for kind in ("valid", "epoch"):
            assert numbers(out, kind) == numbers(tmp_path / "whole", kind)
        for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert not (out / "state.pt").exists()


@pytest.mark.parametrize("stage", ["pretrain", "classify"])
def test_a_signal_ends_a_validation_after_the_batch_under_way(base, tmp_path, monkeypatch, stage):
    options = {"valid": (TEXTS[:40], LABELS[:40]) if stage == "classify" else TEXTS[:40], "batch_size": 4}
    run = stages(base)[stage]
    run(tmp_path / "whole", **options)
    seen, windows, pad = [], results.evaluation_windows, results.pad_batch

    def signal_in_the_second():
        seen.append(len(seen))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluation_windows(*arguments):
        for window in windows(*arguments):
            signal_in_the_second()
            yield window

    def pad_batch(docs):
        signal_in_the_second()
        return pad(docs)

    monkeypatch.setattr(results, "evaluation_windows", evaluation_windows)
    monkeypatch.setattr(results, "pad_batch", pad_batch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step .*resume"):
        run(tmp_path / "x", **options)
    assert len(seen) == 2
    monkeypatch.undo()
    run(tmp_path / "x", resume=True, **options)
    for kind in ("train", "valid", "epoch"):
        assert numbers(tmp_path / "x", kind) == numbers(tmp_path / "whole", kind)


def test_a_crash_goes_on_from_the_last_periodic_save(base, tmp_path):
    def crash(line):
        if line["step"] == 9:
            raise RuntimeError("the power went")

    run = stages(base)["finetune"]
    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "x", save_every=4, callback=crash)
    state = torch.load(tmp_path / "x" / "state.pt", weights_only=True)
    assert state["step"] == 8
    run(tmp_path / "x", save_every=4, resume=True)
    run(tmp_path / "whole", save_every=4)
    assert numbers(tmp_path / "x") == numbers(tmp_path / "whole")


@pytest.fixture
def sigint_raises():
    """Python's own handler, also where pytest runs as a background job, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_raises")
def test_sigint_saves_and_says_how_to_go_on(base, tmp_path):
    def send(line):
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        stages(base)["pretrain"](tmp_path / "x", callback=send)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "x" / "state.pt").exists()


def test_trains_in_a_thread(base, tmp_path):
    thread = threading.Thread(target=lambda: stages(base)["pretrain"](tmp_path / "x", epochs=1))
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "x" / "config.json").read_text())["finished"]


def test_existing_runs_are_safe(base, tmp_path):
    with pytest.raises(FileExistsError, match="holds a finished pretrain run.*overwrite=True"):
        stages(base)["pretrain"](base.path)
    weights = (base.path / "model.safetensors").read_bytes()
    again = uf.pretrain_lm(TEXTS, base.path, valid=TEXTS[:10], resume=True, **BASE)
    assert again.metrics == base.metrics and (base.path / "model.safetensors").read_bytes() == weights
    with pytest.raises(KeyboardInterrupt):
        stages(base)["pretrain"](tmp_path / "x", callback=interrupt_at(2))
    with pytest.raises(FileExistsError, match="interrupted pretrain run: resume=True goes on"):
        stages(base)["pretrain"](tmp_path / "x")
    with pytest.raises(ValueError, match=r"changed: lr=0.5 \(was 0.02\)"):
        stages(base)["pretrain"](tmp_path / "x", resume=True, lr=0.5)
    with pytest.raises(ValueError, match="resume needs the texts"):
        uf.pretrain_lm(TEXTS[:50], tmp_path / "x", resume=True, **TINY, **SIZES)
    stages(base)["pretrain"](tmp_path / "x", overwrite=True, epochs=1)
    assert len({line["epoch"] for line in runs.read_history(tmp_path / "x")}) == 1


def test_transfer_copies_known_rows_and_means_the_rest(base):
    state = {key: value.cpu() for key, value in base.model.state_dict().items()}
    old = base.tokenizer.itos
    new = text.target_vocab(old, ["zebra film"], 1000, 1, keep_base=False)
    moved, known = foreign.transfer(state, old, new)
    assert known == len(new) - 1
    film, zebra = new.index("film"), new.index("zebra")
    for key in ("0.encoder.weight", "1.decoder.bias"):
        assert torch.equal(moved[key][film], state[key][old.index("film")])
        assert torch.allclose(moved[key][zebra], state[key].mean(0))
    assert torch.equal(moved["0.rnns.0.weight_hh_l0_raw"], state["0.rnns.0.weight_hh_l0_raw"])


def test_frozen_groups_stay_and_unfreeze_one_by_one(base, tmp_path):
    seen = {}

    class Spy(fitting.Loop):
        def _log(self):
            seen[self.epoch] = [all(p.requires_grad for p in g) for g in self.groups]
            return super()._log()

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(fitting, "Loop", Spy)
        stages(base)["classify"](tmp_path / "x", epochs=5, gradual_unfreezing=True)
    groups = len(layer_groups(uf.load(tmp_path / "x", "cpu").model))
    assert groups == 4 and [seen[e] for e in range(5)] == [
        [False] * (groups - k) + [True] * k for k in (1, 2, 3, 4, 4)
    ]


def test_from_scratch(base, tmp_path):
    for run in (base, None):
        out = tmp_path / str(run is None)
        texts = TEXTS[:-1] + ["a bad zebra"]
        clf = uf.train_classifier(
            run, texts, LABELS, out, from_scratch=run is not None, **TINY | dict(epochs=1)
        )
        assert clf.predict(TEXTS[:2]) and (clf.tokenizer.itos == base.tokenizer.itos) == (run is not None)
        assert not clf.config.gradual_unfreezing and clf.config.discriminative == 1
    as_dict = dict(epochs=1, batch_size=4, min_freq=1)
    clf = uf.train_classifier(None, TEXTS, LABELS, tmp_path / "dict", preset="tiny", config=as_dict)
    assert not clf.config.gradual_unfreezing and clf.config.discriminative == 1


def test_integer_labels_and_csv(base, tmp_path):
    clf = uf.train_classifier(base, TEXTS, np.array([7, 3] * 30), tmp_path / "a", **TINY | dict(epochs=1))
    assert uf.load(tmp_path / "a", "cpu").classes == clf.classes == [3, 7]
    file = tmp_path / "t.csv"
    file.write_text("text,label\n" + "".join(f"{t},{x}\n" for t, x in zip(TEXTS, LABELS, strict=True)))
    clf = uf.train_classifier(base, file, out=tmp_path / "b", valid=file, **TINY | dict(epochs=1))
    assert 0 <= clf.metrics["valid_accuracy"] <= 1


def test_bf16(base, tmp_path):
    for stage in ("pretrain", "classify"):
        result = stages(base)[stage](tmp_path / stage, precision="bf16")
        assert next(result.model.parameters()).dtype == torch.float32
        fp32 = stages(base)[stage](tmp_path / f"{stage}-32")
        assert result.metrics["loss"] == pytest.approx(fp32.metrics["loss"], rel=0.2)
        assert result.metrics["loss"] != fp32.metrics["loss"]


def test_a_diverging_run_stops_and_keeps_the_last_state(base, tmp_path):
    def poison(line):
        if line["step"] == 6:
            next(iter(loops)).model[0].encoder.weight.data.fill_(math.nan)

    loops = []

    class Spy(fitting.Loop):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            loops.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Loop", Spy)
        with pytest.raises(FloatingPointError, match="the loss became nan before step 7 at lr=0.02"):
            stages(base)["pretrain"](tmp_path / "x", save_every=5, callback=poison)
    assert torch.load(tmp_path / "x" / "state.pt", weights_only=True)["step"] == 5


def test_long_documents_and_odd_batches(base, tmp_path):
    texts = TEXTS[:9] + ["The film was fine and " * 60]
    uf.train_classifier(base, texts, LABELS[:10], tmp_path / "x", max_len=20, **TINY | dict(epochs=1, bptt=8))
    assert len(batches.shuffled_buckets([5] * 9, 4, 0, 0)) == 2
