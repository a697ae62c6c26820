"""What else takes the stock models: ONNX (onnxruntime's numbers), dynamic int8, torch.export."""

import io
import warnings

import pytest
import torch
from torch import nn

import ulmfit_fast as uf

V, E, H = 30, 6, 10
BATCH_AND_TIME = {0: "batch", 1: "time"}
ANY = torch.export.Dim.DYNAMIC
pytestmark = pytest.mark.cpu_only("onnxruntime and int8 are the CPU's here")


def encoder(**options):
    torch.manual_seed(0)
    return uf.AWDLSTM(V, E, H, 2, **options)


def tokens(batch=3, steps=5):
    return torch.randint(V, (batch, steps))


def documents(batch=3, steps=5):
    return tokens(batch, steps), torch.randint(steps + 1, (batch,))


def classifier(**options):
    """In eval, its batch norms used to what they get."""
    model = uf.TextClassifier(encoder(**options), 3, bptt=4, max_len=6)
    with torch.no_grad():
        for _ in range(30):
            model(*documents(9, 12))
    return model.eval()


def names(layers, suffix=""):
    return [f"{state}{layer}{suffix}" for layer in range(layers) for state in "hc"]


def export_onnx(stock, arguments, inputs, outputs, axes):
    """By the exporter that writes an LSTM operator for any batch and length; -> inputs -> results."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    file = io.BytesIO()
    options = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is the older exporter; that the batch should be 1
        torch.onnx.export(stock, arguments, file, dynamo=False, **options)
    return session(ort, file.getvalue())


def session(ort, model):
    running = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(*tensors):
        feeds = {i.name: x.detach().numpy() for i, x in zip(running.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(y) for y in running.run(None, feeds)]

    return run


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bidir", [False, True])
def test_onnx_language_model_with_its_state(bidir):
    lm = uf.LanguageModel(encoder(bidir=bidir)).eval()
    stock = lm.to_torch()
    inputs, outputs = ["ids", *names(2)], ["logits", *names(2, "_n")]
    axes = {"ids": BATCH_AND_TIME, "logits": BATCH_AND_TIME}
    axes |= {name: {1: "batch"} for name in names(2) + names(2, "_n")}
    run = export_onnx(stock, (tokens(), lm[0].zero_hidden(3)), inputs, outputs, axes)
    for batch in (7, 1):
        lm[0].hidden = lm[0].zero_hidden(batch)
        state = sum(lm[0].hidden, ())
        for steps in (11, 1, 2):
            ids = tokens(batch, steps)
            logits, *state = run(ids, *state)
            close(logits, lm(ids))
            close(tuple(state), sum(lm[0].hidden, ()))


@pytest.mark.parametrize("bidir", [False, True])
def test_onnx_classifier(bidir):
    model = classifier(bidir=bidir)
    axes = {"ids": BATCH_AND_TIME, "lengths": {0: "batch"}, "logits": {0: "batch"}}
    run = export_onnx(model.to_torch(), documents(), ["ids", "lengths"], ["logits"], axes)
    for size in ((7, 17), (1, 1), (4, 9)):
        ids, lengths = documents(*size)
        ids[torch.arange(size[1]) >= lengths[:, None]] = -7
        close(run(ids, lengths)[0], model(ids, lengths))


def test_onnx_by_the_newer_exporter_has_any_batch_and_one_length():
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    lm = uf.LanguageModel(encoder()).eval()
    arguments = tokens(), lm[0].zero_hidden(3)
    shapes = {0: ANY}, [({1: ANY}, {1: ANY})] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.LSTM assigns its weights in forward
        program = torch.onnx.export(
            lm.to_torch(), arguments, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    run = session(ort, program.model_proto.SerializeToString())
    for batch in (7, 2):
        ids = tokens(batch, 5)
        lm[0].hidden = lm[0].zero_hidden(batch)
        state = sum(lm[0].hidden, ())
        close(run(ids, *state)[0], lm(ids))


def test_torch_export_has_any_batch_and_one_length():
    model = classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model.to_torch(), documents(), dynamic_shapes=({0: ANY}, {0: ANY}))
    for batch in (7, 2):
        close(exported.module()(*(inputs := documents(batch))), model(*inputs))


def quantised(stock):
    """Weights in int8, products of int8 with activations that are quantised as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to take this over
        return torch.ao.quantization.quantize_dynamic(stock, {nn.LSTM, nn.Linear}, dtype=torch.qint8)


def size_of(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.tell()


def test_int8_keeps_what_a_language_model_has_learnt():
    torch.manual_seed(0)
    no_dropout = dict(hidden_p=0.0, input_p=0.0, embed_p=0.0, weight_p=0.0)
    lm = uf.LanguageModel(uf.AWDLSTM(V, 32, 48, 2, **no_dropout), output_p=0.0)
    optimizer = torch.optim.Adam(lm.parameters(), 0.02)
    ids = (torch.arange(41) * 7 % V).expand(4, -1)
    for _ in range(60):
        lm.reset()
        loss, _ = lm(ids[:, :-1], ids[:, 1:], alpha=0.0, beta=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stock = lm.to_torch()
    small = quantised(stock)
    assert size_of(small) < 0.5 * size_of(stock)
    with torch.no_grad():
        expected, _ = stock(ids[:, :-1])
        logits, state = small(ids[:, :-1])
        assert small(ids[:, -1:], state)[0].shape == (4, 1, V)
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert (logits.argmax(2) == expected.argmax(2)).float().mean() > 0.98
    both = [nn.functional.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in (logits, expected)]
    torch.testing.assert_close(*both, rtol=0.05, atol=0.01)


def test_int8_of_our_own_model_has_its_decoder_quantised():
    lm = uf.LanguageModel(encoder()).eval()
    small = quantised(lm)
    assert not isinstance(small[1].decoder, nn.Linear)
    ids = tokens()
    expected, result = lm(ids), small(ids)
    assert 0 < (result - expected).abs().max() < 0.05 * expected.abs().max()
    small.to(torch.float32).reset()  # nor does moving it tie what is no longer one weight
    close(small(ids), result)


def test_int8_classifier_and_its_copy():
    model = classifier()
    small = quantised(model.to_torch())
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = torch.load(file, weights_only=False)
    inputs = documents(7, 11)
    expected = model(*inputs)
    close(again(*inputs), small(*inputs))
    assert 0 < (small(*inputs) - expected).abs().max() < 0.05 * expected.abs().max()
