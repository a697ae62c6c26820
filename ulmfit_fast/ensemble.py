"""Several classifiers as one: the mean of their probabilities."""

from collections.abc import Iterable

import numpy as np

from .checkpoints import listed
from .results import Predictor, Probabilities, TrainedClassifier
from .text import as_list, check_texts


class ClassifierEnsemble(Predictor):
    """Averages classifiers, such as a forward and a backward one (Howard and Ruder 2018, section 3.3).

    classifiers: TrainedClassifiers of the same classes in any number; sizes, vocabularies and directions may
    differ. ValueError for none or for other classes, TypeError for anything else.
    """

    def __init__(self, classifiers: Iterable[TrainedClassifier]) -> None:
        self.classifiers: list[TrainedClassifier] = as_list(classifiers, "classifiers", "TrainedClassifiers")
        if not self.classifiers:
            raise ValueError("classifiers is empty: at least one TrainedClassifier is needed")
        for i, each in enumerate(self.classifiers):
            if not isinstance(each, TrainedClassifier):
                raise TypeError(
                    f"classifiers[{i}] must be a TrainedClassifier, as load gives for a run, got {each!r}"
                )
        self.classes = list(self.classifiers[0].classes)
        for i, each in enumerate(self.classifiers):
            if each.classes != self.classes:
                raise ValueError(
                    f"classifiers must have the same classes, but classifiers[0] has "
                    f"[{listed(map(repr, self.classes))}] and classifiers[{i}] ({each.path}) has "
                    f"[{listed(map(repr, each.classes))}]"
                )

    def predict_proba(self, texts: Iterable[str], batch_size: int = 64) -> Probabilities:
        """float32 (len(texts), len(classes)): the mean of the classifiers' probabilities, in the order of
        `texts`.
        """
        texts = check_texts(texts, allow_empty=True)
        shares = [each.predict_proba(texts, batch_size) for each in self.classifiers]
        return np.asarray(np.mean(shares, axis=0, dtype=np.float64), np.float32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.classifiers!r})"
