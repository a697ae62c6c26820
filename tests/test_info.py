"""info(): what it says, and that its advice fits."""

import dataclasses
import importlib.util
import pathlib
import re

import pytest
import torch

import ulmfit_fast as uf
from ulmfit_fast import _info, extras

ROOT = pathlib.Path(__file__).parent.parent


def test_says_what_runs():
    facts = uf.info()
    assert facts.version == uf.__version__
    assert facts.torch_running == torch.__version__
    assert facts.threads == torch.get_num_threads()
    assert facts.isa in facts.isas and facts.isas[-1] == "baseline"
    assert facts.cuda_running == torch.version.cuda
    assert bool(facts.architectures) == bool(facts.cuda_built)
    assert dataclasses.asdict(facts)["version"] == uf.__version__


def test_text_has_every_fact():
    facts = uf.info()
    text = str(facts)
    for fact in (facts.version, facts.torch_built, facts.torch_running, *facts.isas, *facts.missing):
        assert fact in text


def test_missing_extras_are_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda m: None if m == "tokenizers" else found(m))
    assert any("pip install tokenizers" in sentence for sentence in uf.info().missing)


def test_extras_are_those_of_pyproject():
    line = re.search(r"^train = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert tuple(re.findall(r'"([^"]+)"', line)) == extras.TRAIN


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),  # machine code runs on later minors of its major
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),  # PTX on anything later
        (["9.0+PTX"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["9.0a+PTX"], (10, 0), False),
        (["8.0", "10.3"], (10, 3), True),
        (["8.0 9.0+PTX"], (9, 0), False),  # what an earlier version wrote down is no error
        (["Ampere", "9.0"], (9, 0), True),
        ([], (9, 0), False),
    ],
)
def test_which_cards_a_build_runs_on(architectures, capability, runs):
    assert _info.runs_on(architectures, capability) is runs
