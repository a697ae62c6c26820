"""The program that measures the ways out: on trained models its perplexity and accuracy are the library's."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest

import ulmfit_fast as uf

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [
    pytest.mark.cpu_only("the program measures the CPU"),
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree"),
]
OPTIONS = dict(preset="tiny", epochs=1, progress=False)


def way_back(*options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    sizes = ["--quick", "--preset", "tiny", "--batch", "3", "--bptt", "9", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.way_back", *sizes, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(language model, classifier, texts, labels, folder with text.txt and labelled.csv)."""
    for package in ("tokenizers", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("way_back")
    texts = ["A fine film , and a finer ending .", "Two hours that never end .", "It ends ."] * 30
    labels = ["good", "bad", "bad"] * 30
    lm = uf.pretrain_lm(texts, out=folder / "lm", **OPTIONS)
    clf = uf.train_classifier(folder / "lm", texts, labels, out=folder / "clf", **OPTIONS)
    (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    with open(folder / "labelled.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return lm, clf, texts, labels, folder


def test_perplexity_and_accuracy_are_the_librarys(trained):
    lm, clf, texts, labels, folder = trained
    data = ["--lm", folder / "lm", "--text", folder / "text.txt"]
    data += ["--classifier", folder / "clf", "--labelled", folder / "labelled.csv"]
    done = way_back(*data, "--results", folder)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(folder.glob("speed-way_back-*.json")).read_text())
    assert str(folder) not in record["command"]
    cases = record["cases"]
    perplexity, accuracy = lm.perplexity(texts, batch_size=3), clf.accuracy(texts, labels)
    for name, side in cases["lm, eval"]["sides"].items():
        tolerance = 1e-4 if name in ("ours fp32", "torch fp32", "onnxruntime fp32") else 0.03
        assert side["perplexity"] == pytest.approx(perplexity, rel=tolerance), name
    for name, side in cases["classifier, eval"]["sides"].items():
        assert side["accuracy"] == pytest.approx(accuracy, abs=1e-5 if name == "torch fp32" else 0.1), name
    for case in cases.values():
        assert case["weights"] == "trained" and {"ours fp32", "torch fp32"} <= set(case["sides"])
        int8 = case["sides"]["torch fp32, dynamic int8"]
        assert 0 < int8["output_error"] < 0.2
        assert int8["file_mb"] < case["sides"]["torch fp32"]["file_mb"]


def test_a_run_without_its_data_is_refused():
    done = way_back("--lm", "runs/nowhere")
    assert done.returncode == 2 and "--lm and --text go together" in done.stderr
