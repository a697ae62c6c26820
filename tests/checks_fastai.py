"""Small text, models and learners of fastai, for the tests of `ulmfit_fast.fastai`; skips without fastai."""

import contextlib
import random

import pytest
import torch

pytest.importorskip("fastai.text.all", reason="needs fastai", exc_type=ImportError)
from fastai.callback.progress import ProgressCallback  # noqa: E402
from fastai.text.all import AWD_LSTM as THEIRS  # noqa: E402
from fastai.text.all import (  # noqa: E402
    TextDataLoaders,
    awd_lstm_clas_config,
    awd_lstm_lm_config,
    language_model_learner,
    text_classifier_learner,
)

from ulmfit_fast.fastai import AWD_LSTM as OURS  # noqa: E402

BOTH = pytest.mark.parametrize("arch", [OURS, THEIRS], ids=["ours", "fastai"])

SIZES = dict(emb_sz=12, n_hid=20, n_layers=2)
LM_CONFIG = {**awd_lstm_lm_config, **SIZES}
CLAS_CONFIG = {**awd_lstm_clas_config, **SIZES}
GOOD = ("I really liked that movie!", "A fine film, and a finer ending.", "Warm, funny and WELL played.")
BAD = ("Two hours that never end.", "Dull, loud and sooooo long.", "I left, and nobody asked me why.")


def write_reviews(folder, train=32, test=12):
    """folder/{train,test}/{pos,neg}/N.txt, a review each, of 5 to 60 words."""
    generator = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for label, sentences in (("pos", GOOD), ("neg", BAD)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count // 2):
                text = " ".join(generator.choices(sentences, k=generator.randint(1, 8)))
                (folder / split / label / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def reviews(path, is_lm=False, **options):
    """DataLoaders of `write_reviews`' folder, on the CPU, read in this process."""
    options = dict(bs=8, seq_len=16, device=torch.device("cpu"), num_workers=0) | options
    return TextDataLoaders.from_folder(path, valid="test", is_lm=is_lm, **options)


def quiet(learn):
    learn.remove_cb(ProgressCallback)
    return learn


def lm_learner(dls, arch=OURS, **options):
    options = dict(config=LM_CONFIG, pretrained=False) | options
    return quiet(language_model_learner(dls, arch, **options))


def classifier(dls, arch=OURS, **options):
    options = dict(config=CLAS_CONFIG, pretrained=False, seq_len=16, drop_mult=0.5) | options
    return quiet(text_classifier_learner(dls, arch, **options))


def in_order(dls):
    """dls whose batches are the same in every fit."""
    dls.train.shuffle = False
    return dls


def fitted(learn, epochs=1, seed=0):
    """learn after a fit, whose losses are (each batch's, validation's and metrics)."""
    torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(epochs, 1e-2)
    return torch.Tensor(torch.stack(learn.recorder.losses)), torch.tensor(list(learn.recorder.values[-1]))


def twins(make, dls, archs, **options):
    """A learner for each architecture, with the same weights."""
    learners = [make(dls, arch, **options) for arch in archs]
    for learn in learners:
        learn.model.load_state_dict(learners[0].model.state_dict())
    return learners


@contextlib.contextmanager
def float64():
    """float64 everywhere, also of fastai's loss and smoothed loss. Decorates a test."""

    def tensor(x, *more, **options):
        return x if isinstance(x, torch.Tensor) else torch.tensor((x, *more) if more else x, **options)

    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("fastai.learner", "fastai.torch_core"):  # their tensor() makes float32 of float64
            patch.setattr(f"{module}.tensor", tensor)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
