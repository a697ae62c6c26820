"""The baseline, trained in seconds: a linear SVM on TF-IDF of word 1- and 2-grams (scikit-learn)."""

import time

from .quality_data import read_split

RECIPE = {"ngram_range": [1, 2], "token_pattern": r"\S+", "sublinear_tf": True, "C": 1.0}


def run(data, dataset):
    """Accuracy on the test split after training on the training split: whole documents, words as they are."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    (texts, labels), (test_texts, test_labels) = (
        read_split(data, dataset, split) for split in ("train", "test")
    )
    start = time.perf_counter()
    vectorizer = TfidfVectorizer(
        ngram_range=tuple(RECIPE["ngram_range"]),
        token_pattern=RECIPE["token_pattern"],
        sublinear_tf=RECIPE["sublinear_tf"],
    )
    classifier = LinearSVC(C=RECIPE["C"]).fit(vectorizer.fit_transform(texts), labels)
    trained = time.perf_counter()
    accuracy = float(classifier.score(vectorizer.transform(test_texts), test_labels))
    return {
        "accuracy": accuracy,
        "test_documents": len(test_texts),
        "hyper_parameters": RECIPE,
        "seconds": {"stage3": trained - start, "test": time.perf_counter() - trained},
    }
