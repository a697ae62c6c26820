"""One JSON file per measured piece, with where and how it was measured."""

import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from .machine import cpu_name

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "ulmfit_fast", "fastai", "tokenizers", "scikit-learn", "onnxruntime")
_PATH_OPTIONS = (
    "--data",
    "--work",
    "--fastai-python",
    "--results",
    "--lm",
    "--text",
    "--classifier",
    "--labelled",
)


def record_path(results, dataset, arm, seed=None):
    return Path(results) / f"quality-{dataset}-{arm}{'' if seed is None else f'-seed{seed}'}.json"


def provenance(threads, device="cpu"):
    """Machine, versions, commit, command: what a reader needs to judge or repeat a figure.

    On a GPU `device` is its name, `host` the processor's, and `gpu` the rest about it.
    """
    place = {"device": cpu_name()}
    if device != "cpu":
        import torch  # imported here: reading records needs neither

        from . import gpu

        place = {"device": torch.cuda.get_device_name(), "host": cpu_name(), "gpu": gpu.description()}
    return {
        **place,
        "cores": os.cpu_count(),
        "isa": _isa(),
        "threads": threads,
        "commit": checked_out(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def save(path, record, show=True):
    """Writes the record, and prints it where `show` says so."""
    write(path, (json.dumps(record, indent=1, sort_keys=False, default=str) + "\n").encode())
    figures = {k: v for k, v in record.items() if show and not isinstance(v, dict)}
    print(f"wrote {path.name}" + (": " + json.dumps(figures) if show else ""))


def write(path, data):
    """Writes the bytes aside and renames, so that an interrupted run leaves only whole files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(data)
    os.replace(aside, path)


def load_all(results, kind="quality"):
    """The records of one kind: "quality", "speed" or "fastai-classifier"."""
    paths = sorted(Path(results).glob(f"{kind}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def recency(record):
    """Sorts records by age: their date, and within a day the time of the commit that they measured."""
    return record["date"], commit_time(str(record["commit"]).partition(" ")[0])


@functools.cache
def commit_time(commit):
    """When a commit was made, in seconds since 1970; 0 where git or this checkout does not know it."""
    command = ["git", "-C", str(Path(__file__).parent), "show", "-s", "--format=%ct", f"{commit}^{{commit}}"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0


def _isa():
    """What ulmfit_fast's CPU kernels use, asked of the library; None where it is not built."""
    try:
        import ulmfit_fast

        return ulmfit_fast.info().isa
    except ImportError:
        return None


def checked_out(results=RESULTS):
    """The commit of the checkout that holds `results`, and whether anything outside that folder differs from
    it; in a copy without .git what ULMFIT_FAST_COMMIT says.
    """
    git = ["git", "-C", str(results.parent)]
    asked = ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", "--", ":/", f":(exclude){results}"]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ULMFIT_FAST_COMMIT")
    return head + (" with local changes" if changes else "")


def _command():
    """The command line with the machine's own paths left out."""
    words, hide = [], False
    for word in sys.argv[1:]:
        name, equals, _ = word.partition("=")
        words.append(name + "=..." if equals and name in _PATH_OPTIONS else "..." if hide else word)
        hide = word in _PATH_OPTIONS
    return " ".join(["python -m", sys.modules["__main__"].__spec__.name, *words])


def _version(package):
    if loaded := getattr(sys.modules.get(package), "__version__", None):
        return loaded  # of torch it names the CUDA version too, which the metadata of PyPI's wheels do not
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
