"""Counts and scores, held against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from sklearn.metrics import confusion_matrix as reference_matrix

from hpo.training.metrics import classification_report, confusion_matrix, top_k_correct

CASES = {
    "random": ([0, 1, 2, 2, 1, 0, 2, 1], [0, 2, 2, 1, 1, 0, 2, 0], 3),
    "perfect": ([0, 1, 2], [0, 1, 2], 3),
    "all wrong": ([0, 1], [1, 0], 2),
    "a class never predicted": ([0, 1, 2, 2], [0, 1, 1, 0], 3),
    "a class never true": ([0, 0, 1], [0, 2, 1], 3),
    "a class in neither": ([0, 1, 1], [1, 1, 0], 5),
    "one image": ([1], [1], 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scores_equal_scikit_learns(case: tuple[list[int], list[int], int]) -> None:
    labels, predictions, classes = np.array(case[0]), np.array(case[1]), case[2]
    matrix = confusion_matrix(labels, predictions, classes)
    report = classification_report(matrix)
    every = list(range(classes))
    assert (matrix == reference_matrix(labels, predictions, labels=every)).all()
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=every, zero_division=0
    )
    np.testing.assert_allclose(report.precision, precision)
    np.testing.assert_allclose(report.recall, recall)
    np.testing.assert_allclose(report.f1, f1)
    assert (report.support == support).all()
    macro = precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)[
        :3
    ]
    np.testing.assert_allclose(
        (report.macro_precision, report.macro_recall, report.macro_f1), macro
    )
    assert report.accuracy == pytest.approx(accuracy_score(labels, predictions))


def test_an_empty_matrix_scores_zero() -> None:
    report = classification_report(np.zeros((3, 3), dtype=np.int64))
    assert (report.accuracy, report.macro_f1) == (0.0, 0.0)


def test_top_k_counts_labels_among_the_largest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    assert [int(top_k_correct(logits, labels, k)) for k in (1, 2, 3)] == [1, 2, 3]


def test_top_5_of_fewer_classes_is_always_right() -> None:
    assert int(top_k_correct(torch.randn(7, 3), torch.arange(7) % 3, 5)) == 7
