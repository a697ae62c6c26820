"""Real text through fastai's pipeline with both architectures: they learn alike."""

import pytest
import torch
from checks_fastai import LM_CONFIG, OURS, THEIRS, classifier, fitted, lm_learner
from fastai.text.all import Perplexity, TextDataLoaders, accuracy

from ulmfit_fast import demo_text
from ulmfit_fast.fastai import accelerate

pytestmark = pytest.mark.cpu_only("fastai's side is the CPU's")
SIDES = [(THEIRS, False), (OURS, False), (THEIRS, True)]


@pytest.fixture(scope="module")
def documentation():
    """torch's documentation strings, of two of its packages."""
    pandas = pytest.importorskip("pandas")  # fastai brings it
    texts, labels = demo_text.labelled_text(most=120, max_words=60)
    frame = pandas.DataFrame({"text": texts, "label": labels})
    frame = frame[frame.label.isin(["nn", "distributed"])].reset_index(drop=True)
    return frame.assign(is_valid=[i % 4 == 3 for i in range(len(frame))])


def loaders(frame, **options):
    options |= dict(text_col="text", valid_col="is_valid", bs=16, seq_len=24, device=torch.device("cpu"))
    return TextDataLoaders.from_df(frame, **options)


def test_language_models_learn_alike(documentation):
    dls = loaders(documentation, is_lm=True)
    config = {**LM_CONFIG, "emb_sz": 32, "n_hid": 48}
    found, first = [], None
    for arch, swap in SIDES:
        learn = lm_learner(dls, arch, config=config, metrics=Perplexity())
        first = first or {key: value.clone() for key, value in learn.model.state_dict().items()}
        learn.model.load_state_dict(first)
        losses, (_, loss, perplexity) = fitted(accelerate(learn) if swap else learn, epochs=3)
        assert losses[-1] < 0.85 * losses[0]
        torch.testing.assert_close(perplexity, loss.exp(), rtol=1e-4, atol=0)
        found.append(loss)
    torch.testing.assert_close(torch.stack(found[1:]), found[0].expand(2), rtol=0.03, atol=0)


def test_classifiers_learn_alike(documentation):
    """The training loss, that is: of two hundred documents the held-out accuracy is mostly chance."""
    dls = loaders(documentation, label_col="label")
    for arch, swap in SIDES:
        learn = classifier(dls, arch, metrics=accuracy, drop_mult=0.1, seq_len=24)
        losses, _ = fitted(accelerate(learn) if swap else learn, epochs=6)
        assert losses[0] > 0.6 and losses[-1] < 0.4
