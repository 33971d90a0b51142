"""Scores by hand, and what is made of them."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from mosa_fast.data.loading import evaluation_loader
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.evaluation import MOST_CONFUSED, evaluate
from mosa_fast.training.pictures import plot_confusion
from mosa_fast.training.report import class_table, weakest

ONE = Ranks(0, 1, torch.device("cpu"))


def scores_of(logits, labels, classes, **options):
    """The model gives back what it is given."""
    loader = evaluation_loader(TensorDataset(logits, torch.tensor(labels)), 2)
    return evaluate(nn.Identity(), loader, ONE, classes, **options)


def test_scores_are_those_of_the_formulas():
    logits, labels = torch.randn(7, 8, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3, 4, 5, 5]
    scores = scores_of(logits, labels, 8, confusion=True)
    order = logits.argsort(1, descending=True)
    targets = torch.tensor(labels)
    assert scores.accuracy == pytest.approx(100 * (order[:, 0] == targets).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).double().mean().item())
    assert scores.top5 > scores.accuracy
    assert scores.loss == pytest.approx(F.cross_entropy(logits, targets).item())
    expected = torch.zeros(8, 8, dtype=torch.int64)
    for label, predicted in zip(labels, order[:, 0].tolist(), strict=True):
        expected[label, predicted] += 1
    assert torch.equal(scores.confusion, expected)
    assert set(scores.named("val")) == {"val_accuracy", "val_loss", "val_top5"}


def test_few_classes_have_no_top_five_and_too_many_no_confusion():
    few = scores_of(torch.eye(5), [0, 1, 2, 3, 3], 5)
    assert (few.top5, few.confusion, few.accuracy) == (None, None, 80.0)
    assert set(few.named("test")) == {"test_accuracy", "test_loss"}
    many = MOST_CONFUSED + 1
    assert scores_of(torch.zeros(2, many), [0, 1], many, confusion=True).confusion is None


def test_classes_are_told_apart_by_name_number_and_what_they_are_taken_for():
    logits = torch.eye(3)[[0, 1, 1, 0]]
    table = class_table(scores_of(logits, [0, 1, 0, 0], 3, confusion=True), ["cat", "dog", "owl"])
    assert table == json.loads(json.dumps(table))
    assert table[0] == {"class": "cat", "images": 3, "accuracy": pytest.approx(200 / 3), "taken_for": {"0": 2, "1": 1}}
    assert table[1] == {"class": "dog", "images": 1, "accuracy": 100.0, "taken_for": {"1": 1}}
    assert table[2] == {"class": "owl", "images": 0, "accuracy": None, "taken_for": {}}
    assert weakest(table) == "cat: 67 %, dog: 100 %"


@pytest.mark.parametrize("classes", [2, 41, 300])
def test_confusion_is_drawn_for_any_number_of_classes_and_for_names_of_any_kind(tmp_path, classes):
    names = [f"$\\frac{{{index}" for index in range(classes)]
    plot_confusion(tmp_path / "confusion.png", torch.eye(classes, dtype=torch.int64), names)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
