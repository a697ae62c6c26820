"""The optional packages of the training part, imported when a stage needs them and not before."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

TRAIN = ("tokenizers", "safetensors", "tqdm", "matplotlib")


def _missing(names: Iterable[str]) -> ImportError:
    return ImportError(
        f"not installed: {', '.join(names)}; the extra [train] of ulmfit_fast has what training needs. "
        f"Type: pip install {' '.join(TRAIN)}"
    )


def need(name: str) -> Any:
    """Imports and returns the module `name` ("matplotlib.figure"), or raises ImportError saying what to
    install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name != name.partition(".")[0]:
            raise
        raise _missing([error.name]) from None


def check_train_extras() -> None:
    """Raises ImportError now, not an hour into a run, when a package of the extra [train] is missing."""
    missing = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        raise _missing(missing)
