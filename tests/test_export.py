"""The modules as programs: torch.export with any batch and length, saved and loaded; AOTInductor."""

import copy
import io
import os
import shutil

import pytest
import torch
from checks import DEVICE
from torch import nn

import ulmfit_fast as uf

V, E, H = 30, 6, 10
ANY = torch.export.Dim.DYNAMIC
BATCH_AND_TIME = {0: ANY, 1: ANY}
SIZES = [(7, 11), (1, 1), (4, 20)]  # others than the (3, 5) that is exported


def encoder(**options):
    torch.manual_seed(0)
    return uf.AWDLSTM(V, E, H, 1, **options).to(DEVICE).eval()


def tokens(batch=3, steps=5):
    return torch.randint(V, (batch, steps), device=DEVICE)


def floats(batch=3, steps=5):
    return torch.randn(batch, steps, E, device=DEVICE)


def documents(batch=3, steps=5):
    return tokens(batch, steps), torch.randint(steps + 1, (batch,)).to(DEVICE)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class OneStep(nn.Module):
    """What to export of a language model where its state is wanted: in and out, as arguments and results."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, hidden):
        outputs, hidden = self.lm[0].run(ids, hidden)
        return self.lm[1](outputs[-1]), hidden


def export_step(lm):
    arguments = tokens(), lm[0].zero_hidden(3)
    shapes = BATCH_AND_TIME, [({1: ANY}, {1: ANY})] * lm[0].n_layers
    return torch.export.export(OneStep(lm), arguments, dynamic_shapes=shapes)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["WeightDropLSTM", "EmbeddingDropout", "VariationalDropout"])
def test_layers(name, train, strict):
    module, draw = {
        "WeightDropLSTM": (uf.WeightDropLSTM(E, H, 2, batch_first=True, weight_p=0.5), floats),
        "EmbeddingDropout": (uf.EmbeddingDropout(nn.Embedding(V, E), 0.5), tokens),
        "VariationalDropout": (uf.VariationalDropout(0.5), floats),
    }[name]
    module.to(DEVICE).train(train)
    exported = torch.export.export(module, (draw(),), dynamic_shapes=(BATCH_AND_TIME,), strict=strict)
    program = exported.module()
    for size in SIZES:
        x = draw(*size)
        torch.manual_seed(2)
        y = program(x)
        torch.manual_seed(2)
        close(y, module(x))
    x = draw(7, 11)
    first, again = program(x), program(x)
    assert torch.equal(*(y if isinstance(y, torch.Tensor) else y[0] for y in (first, again))) != train


@pytest.mark.parametrize("strict", [False, True])
def test_language_model_starts_from_zeros_and_leaves_its_state_alone(strict):
    lm = uf.LanguageModel(encoder()).to(DEVICE).eval()
    lm(tokens())
    before = copy.deepcopy(lm[0].hidden)
    program = torch.export.export(lm, (tokens(),), dynamic_shapes=(BATCH_AND_TIME,), strict=strict).module()
    torch.testing.assert_close(lm[0].hidden, before, rtol=0, atol=0)
    for size in SIZES:
        ids = tokens(*size)
        lm.reset()
        expected = lm(ids)
        for _ in range(2):
            close(program(ids), expected)


@pytest.mark.filterwarnings("ignore")  # that it is deprecated, and that sizes are compared
def test_jit_trace_does_not_freeze_the_state_in():
    lm = uf.LanguageModel(encoder()).to(DEVICE).eval()
    lm(tokens())
    before = copy.deepcopy(lm[0].hidden)
    with torch.no_grad():
        traced = torch.jit.trace(lm, (tokens(),), check_trace=False)  # the check calls the module itself
        torch.testing.assert_close(lm[0].hidden, before, rtol=0, atol=0)
        for size in SIZES:
            ids = tokens(*size)
            lm.reset()
            expected = lm(ids)
            for _ in range(2):
                close(traced(ids), expected)


def test_language_models_state_as_arguments():
    lm = uf.LanguageModel(uf.AWDLSTM(V, E, H, 2, bidir=True)).to(DEVICE).eval()
    program = export_step(lm).module()
    for batch in (7, 1):
        lm[0].hidden = hidden = lm[0].zero_hidden(batch)
        for steps in (11, 1, 2):
            ids = tokens(batch, steps)
            logits, hidden = program(ids, hidden)
            close(logits, lm(ids))
            close(hidden, lm[0].hidden)


@pytest.mark.parametrize("strict", [False, True])
def test_classifier_saved_and_loaded(strict):
    model = uf.TextClassifier(encoder(), 3, bptt=4, max_len=10).to(DEVICE).eval()
    shapes = BATCH_AND_TIME, {0: ANY}
    exported = torch.export.export(model, documents(), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    for size in SIZES:
        ids, lengths = documents(*size)
        close(program(ids, lengths), model(ids, lengths))


def test_bidirectional_classifier_for_one_width():
    model = uf.TextClassifier(encoder(bidir=True), 3, bptt=4, max_len=6).to(DEVICE).eval()
    shapes = {0: ANY}, {0: ANY}
    program = torch.export.export(model, documents(3, 7), dynamic_shapes=shapes).module()
    for batch in (7, 1):
        ids, lengths = documents(batch, 7)
        close(program(ids, lengths), model(ids, lengths))


@pytest.mark.cpu_only("nothing in it is the device's")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_aot_inductor_package_carries_the_state(tmp_path):
    lm = uf.LanguageModel(encoder()).eval()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export_step(lm), package_path=str(tmp_path / "lm.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        hidden = lm[0].zero_hidden(7)
        for steps in (11, 1):
            ids = tokens(7, steps)
            logits, hidden = run(ids, hidden)
            close(logits, lm(ids))
