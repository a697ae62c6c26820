"""Tiny runs of the three stages, for the tests of training, of the command line and of bad input."""

import random

from checks import DEVICE

TINY = dict(preset="tiny", progress=False, epochs=2, batch_size=4, log_every=1, min_freq=1, device=DEVICE)
SIZES = dict(emb_sz=12, n_hid=16, n_layers=2, bptt=8)
ADJECTIVES = {"good": ("fine", "great", "lovely", "superb"), "bad": ("dull", "awful", "poor", "weak")}


def sentences(n=60, seed=0):
    """(texts, labels): n sentences, every other one good, whose adjectives tell the label."""
    chooser, labels = random.Random(seed), [("good", "bad")[i % 2] for i in range(n)]
    nouns = ("film", "book", "song", "play")
    texts = [
        f"The {chooser.choice(nouns)} was {chooser.choice(ADJECTIVES[label])} and "
        + " and ".join(chooser.choice(ADJECTIVES[label]) for _ in range(chooser.randint(1, 4)))
        + " ."
        for label in labels
    ]
    return texts, labels
