"""metrics.jsonl where a loss is large, infinite or NaN: valid JSON, and read back as what it was."""

import json
import math
import warnings

import pytest
from checks import DEVICE
from stages import SIZES, TINY, sentences

import ulmfit_fast as uf
from ulmfit_fast import cli, fitting, plots, results, runs
from ulmfit_fast.history import as_json, perplexity, read_history

for _extra in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_extra)

TEXTS, _ = sentences(24)
ONE = TINY | SIZES | dict(epochs=1)


def strictly(text):
    """JSON as other programs read it, without Infinity and NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_perplexity_overflows_to_infinity():
    assert perplexity(709.0) == math.exp(709.0) and perplexity(710.0) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_lines_come_back_as_they_were(tmp_path):
    lines = [
        {"kind": "valid", "loss": 2.0, "perplexity": 7.4},
        {"kind": "valid", "loss": 800.0, "perplexity": math.inf},
        {"kind": "valid", "loss": math.nan, "perplexity": math.nan},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(as_json, lines)) + "\n")
    assert [strictly(line)["perplexity"] for line in file.read_text().splitlines()] == [7.4, None, None]
    assert repr(read_history(file)) == repr(lines)
    file.write_text('{"kind": "valid", "loss": 800.0, "perplexity": Infinity}\n')  # of earlier versions
    assert read_history(file) == [lines[1]]


def test_a_run_with_huge_losses(tmp_path, monkeypatch, capsys):
    for module in (fitting, results):
        monkeypatch.setattr(module, "stream_loss", lambda *a: 800.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = uf.pretrain_lm(TEXTS, tmp_path / "x", valid=TEXTS[:5], **ONE | dict(lr=1e4, clip=0, epochs=2))
    for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines():
        strictly(line)
    assert lm.metrics["loss"] > 710 and lm.metrics["perplexity"] == lm.metrics["valid_perplexity"] == math.inf
    assert lm.perplexity(TEXTS) == math.inf
    assert uf.load(tmp_path / "x").metrics == lm.metrics
    assert repr(runs.read_history(lm.path)) == repr(lm.history)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    line = ["pretrain", "a.txt", "--out", "y", "--preset", "tiny", "--epochs", "1", "--valid", "a.txt"]
    assert cli.main([*line, "--device", str(DEVICE)]) == 0
    said = capsys.readouterr()
    assert "validation perplexity inf" in said.out and "validation loss 800.000, perplexity inf" in said.err


@pytest.mark.parametrize("last", [700.0, 1e26, math.nan])
def test_curves_of_huge_losses(last):
    losses = [2.0] * 4 + [last]
    history = [
        {"kind": kind, "step": step, "loss": loss, "perplexity": perplexity(loss), "lr": 0.1}
        for step, loss in enumerate(losses)
        for kind in ("train", "valid")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.curves(history, "pretrain").startswith(b"\x89PNG")
