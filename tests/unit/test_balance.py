"""Classes of unequal size: weights of the loss, balanced draws, and what `hpo check` says."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from hpo.config.augment import AugmentConfig
from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.data.dataset import open_data
from hpo.errors import ConfigError
from hpo.paths import Home
from hpo.trained.dry_run import check
from hpo.training.inputs import TrainingData
from hpo.training.learner import Learner
from hpo.training.loader import TrainBatches, balanced_order, class_weights
from hpo.training.losses import make_loss
from hpo.training.train import train
from tests.harness.fakes import study_file
from tests.harness.images import make_folder, picture

CPU = torch.device("cpu")
COUNTS = (40, 8, 4)
"""Training images of each class of `unequal`."""


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    root = make_folder(tmp_path / "pictures", {"train": 4, "val": 3}, size=(20, 16))
    source = random.Random(5)
    for label, count in enumerate(COUNTS):
        for i in range(4, count):
            one = picture(label, 3, (20, 16), source)
            one.save(root / "train" / f"class{label}" / f"{i:04}.png")
    return root


def config(root: Path, **data: Any) -> TrainConfig:
    folder = {"dataset": "folder", "root": str(root), "image_size": 12, **data}
    runtime = {"precision": "float32", "memory_format": "contiguous"}
    return TrainConfig.parse(
        {"epochs": 2, "batch_size": 16, "data": folder, "runtime": runtime}
    )  # fmt: skip


def opened(root: Path, home: Home, **data: Any) -> TrainingData:
    found = open_data(config(root, **data).data, home.cache)
    return TrainingData(len(found.classes), found.train, found.val, found.mean, found.std)


def test_weights_are_scikit_learns() -> None:
    labels = np.random.default_rng(0).choice(5, 200, p=[0.6, 0.2, 0.1, 0.06, 0.04])
    weights = class_weights(labels, 5)
    theirs = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert weights.numpy() == pytest.approx(theirs)
    assert weights[torch.from_numpy(labels)].mean().item() == pytest.approx(1)
    assert class_weights(np.array([0, 0, 2]), 4).tolist() == [0.75, 1.0, 1.5, 1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_each_image_counts_by_its_class(smoothing: float) -> None:
    logits, labels = torch.randn(9, 3), torch.tensor([0, 1, 2] * 3)
    weights = torch.tensor([0.5, 1.0, 4.0])
    each = [
        weights[truth] * functional.cross_entropy(one[None], truth[None], label_smoothing=smoothing)
        for one, truth in zip(logits, labels, strict=True)
    ]
    smoothed = TrainConfig.parse({"label_smoothing": smoothing})
    found = make_loss(smoothed, weights)(logits, labels)
    assert found.item() == pytest.approx(torch.stack(each).mean().item())
    ones = make_loss(smoothed, torch.ones(3))(logits, labels)
    plain = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert ones.item() == pytest.approx(plain.item())


def test_parts_of_a_batch_add_up(unequal: Path) -> None:
    batch = torch.randn(12, 3, 12, 12), torch.tensor([0] * 8 + [1, 1, 2, 2])
    states = []
    for micro_batch in (12, 4):
        torch.manual_seed(0)
        whole = config(unequal, balance="loss")
        learner = Learner(whole, classes=3, device=CPU, micro_batch=micro_batch)
        learner.model.eval()  # batch norm sees one part at a time
        learner.set_class_weights(torch.tensor([0.5, 1.0, 4.0]))
        learner.step(batch, 0.1)
        states.append(torch.cat([one.detach().flatten() for one in learner.model.parameters()]))
    torch.testing.assert_close(states[0], states[1])


def test_a_balanced_epoch_draws_every_class_alike() -> None:
    labels = torch.tensor([0] * 5000 + [2] * 900 + [3] * 100)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    order = balanced_order(labels, torch.Generator().manual_seed(2))
    assert len(order) == len(labels)
    counts = torch.bincount(labels[order], minlength=4)
    assert counts[1] == 0
    assert all(abs(int(counts[one]) - 2000) < 200 for one in (0, 2, 3))  # 5 deviations
    # Within a class, too: every one of the 100 about 20 times.
    rare = Counter(order[labels[order] == 3].tolist())
    assert len(rare) == 100
    assert max(rare.values()) < 50


def test_a_balanced_epoch_depends_on_seed_and_epoch_alone(unequal: Path, home: Home) -> None:
    data = opened(unequal, home)

    def labels(seed: int, epoch: int, *, balanced: bool = True) -> list[int]:
        batches = TrainBatches(
            data.train, mean=data.mean, std=data.std, augment=AugmentConfig(), image_size=12,
            batch_size=16, device=CPU, seed=seed, balanced=balanced,
        )  # fmt: skip
        return [int(one) for _, truth in batches.epoch(epoch) for one in truth]

    torch.manual_seed(3)
    first = labels(0, 1)
    torch.manual_seed(4)
    assert labels(0, 1) == first
    assert labels(0, 2) != first
    assert labels(1, 1) != first
    assert len(first) == sum(COUNTS)
    assert Counter(first)[2] > 2 * COUNTS[2]
    assert Counter(labels(0, 1, balanced=False)) == dict(enumerate(COUNTS))


@pytest.mark.parametrize("balance", ["none", "loss", "sampling"])
def test_training_reads_the_field(unequal: Path, home: Home, balance: str) -> None:
    results = {
        one: list(train(config(unequal, balance=one), opened(unequal, home), NullControl(),
                        device=CPU))[-1].metrics
        for one in ("none", balance)
    }  # fmt: skip
    same = results["none"]["val_loss"] == results[balance]["val_loss"]
    assert same == (balance == "none")


def test_an_unknown_way() -> None:
    with pytest.raises(ConfigError, match=r'data.balance: "weights": allowed: none, loss, sampl'):
        TrainConfig.parse({"data": {"balance": "weights"}})


def checked(root: Path, home: Home) -> str:
    data = f'data = {{dataset = "folder", root = "{root}", image_size = 12}}\n'
    file = study_file(train=data)
    return str(check(file, home=home, device="cpu", workers=1, threads=1))


def test_check_shows_unequal_classes(unequal: Path, home: Home) -> None:
    assert (
        "\n  unequal classes: class0 has 10 times as many training images as class2 (40 and 4); "
        'data.balance = "loss" or "sampling" lets them count alike\n'
    ) in checked(unequal, home)


def test_check_says_nothing_of_equal_classes(tmp_path: Path, home: Home) -> None:
    root = make_folder(tmp_path / "pictures", {"train": 4, "val": 3}, size=(20, 16))
    assert "unequal" not in checked(root, home)
