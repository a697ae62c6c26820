"""benchmarks/fastai_classifier.py in miniature: every arm runs, and the record says what and where."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from checks_fastai import BAD, GOOD

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [
    pytest.mark.cpu_only("the program measures the CPU"),
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the source tree"),
]
SMALL = "--emb-sz 12 --n-hid 16 --n-layers 2 --batch-size 4 --bptt 8 --lm-epochs 2 --epochs 4 --max-docs 16"


def test_every_arm_has_a_run(tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    for name in ("general", "wikitext-2", "movie-reviews", "trec-6"):
        (data / name).mkdir(parents=True)
    for split in ("train", "test"):
        with open(data / "trec-6" / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            rows = [(label, text) for label, texts in (("pos", GOOD), ("neg", BAD)) for text in texts * 4]
            csv.writer(file).writerows([("label", "text"), *rows[::2], *rows[1::2]])
    command = [sys.executable, "-m", "benchmarks.fastai_classifier", "--data", str(data), *SMALL.split()]
    command += ["--arms", "fastai", "ours", "accelerated", "--results", str(results), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((results / "fastai-classifier-trec-6-threads1.json").read_text())
    assert [r["arm"] for r in record["runs"]] == ["fastai", "ours", "accelerated"]
    assert (record["train_documents"], record["test_documents"], record["threads"]) == (16, 16, 1)
    assert record["versions"]["torch"] == torch.__version__ and record["device"] and record["isa"]
    assert record["hyper_parameters"]["epochs"] == 4 and str(tmp_path) not in json.dumps(record)
    for run in record["runs"]:
        assert 0 <= run["accuracy"] <= 1 and 0 < run["lm_loss"] < 10
        assert min(run["seconds"].values()) > 0 and min(run["cpu_seconds"].values()) > 0
    last = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in last[-4:]] == ["arm", "fastai", "ours", "accelerated"]
