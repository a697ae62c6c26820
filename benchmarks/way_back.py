"""The export formats beside the library itself, in eval: python -m benchmarks.way_back

A language model and a classifier as they are, as `to_torch()`'s stock modules, as these with torch's dynamic
int8, and as their ONNX file in onnxruntime: time of a forward pass, size in a file, and how far the outputs
are from ours in float32. With trained models (`--lm RUN --text FILE`, `--classifier RUN --labelled FILE`)
perplexity and accuracy too; otherwise weights are fresh and tokens drawn as Zipf's law has them.
"""

import functools
import importlib.util
import io
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ulmfit_fast.batches import evaluation_windows, pad_batch
from ulmfit_fast.corpus import read_labelled, read_texts
from ulmfit_fast.results import build_classifier, build_lm, load

from . import arguments, harness, steps
from .harness import Side

DOCUMENTS = 64  # in a batch, where accuracy is measured


@dataclass
class Way:
    """run(*inputs) -> outputs, logits first; of a language model inputs and outputs end with its state."""

    package: str
    run: object
    megabytes: float
    variant: str = ""
    precisions: list = field(default_factory=lambda: ["fp32"])


def ways(model, inputs, precisions):
    """Every way that `model` can be run here; inputs: of one call, with which the ONNX file is made."""
    stock = model.to_torch()
    is_lm = hasattr(model[1], "decoder")

    def ours(ids, *rest):
        if not is_lm:
            return (model(ids, *rest),)
        outputs, state = model[0].run(ids, *rest)
        return model[1](outputs[-1]), state

    def call(module):
        return lambda *tensors: module(*tensors) if is_lm else (module(*tensors),)

    yield Way("ours", ours, _megabytes(model.state_dict()), precisions=precisions)
    yield Way("torch", call(stock), _megabytes(stock))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to take this over
        kinds = {torch.nn.LSTM, torch.nn.Linear}
        int8 = torch.ao.quantization.quantize_dynamic(stock, kinds, dtype=torch.qint8)
    yield Way("torch", call(int8), _megabytes(int8), variant="dynamic int8")
    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        yield _onnx(stock, inputs, is_lm)


def _onnx(stock, inputs, is_lm):
    import onnxruntime

    rows, both, file = {0: "batch"}, {0: "batch", 1: "time"}, io.BytesIO()
    names = [f"{name}{layer}" for layer in range(len(stock.rnns._modules)) for name in "hc"] if is_lm else []
    axes = {"ids": both, "lengths": rows, "logits": both if is_lm else rows}
    axes |= {name + end: {1: "batch"} for name in names for end in ("", "_n")}
    given, results = ["ids", *(names or ["lengths"])], ["logits", *(f"{name}_n" for name in names)]
    axes = {name: axis for name, axis in axes.items() if name in given + results}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that keeps any length is the older one
        options = {"input_names": given, "output_names": results, "dynamic_axes": axes}
        torch.onnx.export(stock, inputs, file, dynamo=False, **options)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def run(*tensors):
        flat = torch.utils._pytree.tree_leaves(tensors)
        feeds = {name: x.contiguous().numpy() for name, x in zip(given, flat, strict=True)}
        logits, *state = map(torch.from_numpy, session.run(None, feeds))
        return (logits, list(zip(state[::2], state[1::2], strict=True))) if is_lm else (logits,)

    return Way("onnxruntime", run, len(file.getvalue()) / 1e6)


def _megabytes(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return file.tell() / 1e6


@torch.no_grad()
def run_once(way, precision, inputs):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return way.run(*inputs)


def measure(model, inputs, args, quality):
    """The record of one model. quality: {figure: function of run(*inputs) -> it}."""
    found = list(ways(model, inputs, args.precision))
    sides, figures = [], {}
    reference = run_once(found[0], "fp32", inputs)[0]
    for way in found:
        for precision in way.precisions:
            side = Side(way.package, precision, None, variant=way.variant)
            run = functools.partial(run_once, way, precision)

            def timed(mark, run=run):
                begin = mark()
                run(inputs)
                return begin, mark()

            side.run = timed
            sides.append(side)
            with side.settings():
                error = (run(inputs)[0].float() - reference).abs().max() / reference.abs().max()
                more = {name: function(run) for name, function in quality.items()}
            figures[side.name] = {"file_mb": round(way.megabytes, 3), "output_error": float(error)} | more
    seconds = harness.interleave(sides, args.repeats)
    tokens = inputs[0].numel() if hasattr(model[1], "decoder") else int(inputs[1].sum())
    record = {"shapes": {"ids (B, T)": list(inputs[0].shape), "tokens": tokens}, "sides": {}}
    record["weights"] = "trained" if quality else "fresh"
    for side in sides:
        numbers = harness.figures(side, seconds[side.name])
        numbers["tokens_per_s"] = round(1e3 * tokens / numbers["total_ms"]["median"], 1)
        record["sides"][side.name] = numbers | figures[side.name]
    return record


def language_model(args, case):
    """(model, inputs, quality) of the run in --lm and the texts in --text, or of fresh weights."""
    if not args.lm:
        model = build_lm(case.sizes, case.vocab, case.config.dropouts()).eval()
        return model, (case.draw_ids(case.batch, case.bptt), model[0].zero_hidden(case.batch)), {}
    run = load(args.lm, device="cpu")
    model, docs = run.model.eval(), run.tokenizer.encode(read_texts(args.text))
    windows = list(evaluation_windows(docs, case.batch, case.bptt))
    while len(windows) > 1 and sum(ids.numel() for ids, _ in windows) > args.tokens:
        windows.pop()

    def perplexity(run):
        state, total, count = model[0].zero_hidden(len(windows[0][0])), 0.0, 0
        for ids, targets in windows:
            rows = len(ids)
            logits, state = run((ids, [(h[:, :rows], c[:, :rows]) for h, c in state]))
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
            count += int((targets != -100).sum())
        return round(math.exp(total / count), 4)

    ids = windows[0][0]
    return model, (ids, model[0].zero_hidden(len(ids))), {"perplexity": perplexity}


def classifier(args, case):
    """(model, inputs, quality) of the run in --classifier and the documents in --labelled, or fresh."""
    if not args.classifier:
        model = build_classifier(case.sizes, case.vocab, steps.CLASSES, case.config).eval()
        return model, pad_batch([np.asarray(case.draw_ids(n)) for n in case.lengths]), {}
    run = load(args.classifier, device="cpu")
    texts, labels = read_labelled(args.labelled)
    docs = run.tokenizer.encode(texts)
    order = sorted(range(len(docs)), key=lambda k: len(docs[k]))

    def accuracy(predict):
        right = 0
        for start in range(0, len(order), DOCUMENTS):
            rows = order[start : start + DOCUMENTS]
            chosen = predict(pad_batch([docs[k] for k in rows]))[0].argmax(1).tolist()
            right += sum(run.classes[c] == labels[k] for c, k in zip(chosen, rows, strict=True))
        return round(right / len(docs), 5)

    return run.model.eval(), pad_batch([docs[k] for k in order[-case.batch :]]), {"accuracy": accuracy}


def main():
    parser = arguments.options(__doc__, on_gpu=("fp32",), batch=[16])
    parser.add_argument("--vocab", nargs="+", type=arguments.positive, default=[30000], help="words")
    parser.add_argument("--lm", help="run directory of stage 1 or 2")
    parser.add_argument("--text", help="what --lm's perplexity is measured on")
    parser.add_argument("--tokens", type=arguments.positive, default=50000, help="of --text, at most")
    parser.add_argument("--classifier", help="run directory of stage 3")
    parser.add_argument("--labelled", help="CSV with text and label for --classifier's accuracy")
    args = arguments.parse(parser)
    for run, data in (("lm", "text"), ("classifier", "labelled")):
        if bool(getattr(args, run)) != bool(getattr(args, data)):
            parser.error(f"--{run} and --{data} go together")
    if args.device != "cpu":
        parser.error("argument --device: onnxruntime and int8 are measured on the CPU alone")
    torch.manual_seed(0)
    for threads, roof in harness.places(args):
        for batch in args.batch:
            for vocab in args.vocab:
                cases = {}
                for task, make in (("lm", language_model), ("classifier", classifier)):
                    case = steps.Case(task, args.preset, batch, args.bptt, vocab)
                    model, inputs, quality = make(args, case)
                    cases[f"{task}, eval"] = measure(model, inputs, args, quality)
                sizes = {"preset": args.preset, "batch": batch, "bptt": args.bptt, "vocab": vocab}
                harness.publish(args, "way_back", threads, sizes, roof, cases)


if __name__ == "__main__":
    main()
