"""Mixup and cutmix: torchvision's arithmetic and distributions, and what the loss makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.transforms import v2

from hpo.config.augment import AugmentConfig
from hpo.config.train import TrainConfig
from hpo.training.augment import ops
from hpo.training.augment.ops import Mix, Mixed
from hpo.training.learner import Learner, RunningMeans

STEPS = 4_000


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    pictures = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return pictures, torch.tensor([0, 1, 2, 1, 3])


def _theirs(transform: Any, params: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = _batch()
    params |= {"labels": labels, "batch_size": 5, "num_classes": 4}
    return transform.transform(pictures, params), transform.transform(labels, params)


def _soft(labels: Mixed, classes: int = 4) -> torch.Tensor:
    own, other = (functional.one_hot(x, classes) for x in (labels.labels, labels.others))
    return labels.weight * own + (1 - labels.weight) * other


def test_mixup_equals_torchvision() -> None:
    pictures, labels = ops.mix_batch(*_batch(), Mix(0.7))
    wanted, soft = _theirs(v2.MixUp(num_classes=4), {"lam": 0.7})
    torch.testing.assert_close(pictures, wanted)
    torch.testing.assert_close(_soft(labels), soft)


def test_cutmix_equals_torchvision() -> None:
    weight = 1 - 4 * 7 / 144
    pictures, labels = ops.mix_batch(*_batch(), Mix(weight, (2, 3, 6, 10)))
    params = {"box": (3, 2, 10, 6), "lam_adjusted": weight}
    wanted, soft = _theirs(v2.CutMix(num_classes=4), params)
    assert torch.equal(pictures, wanted)
    torch.testing.assert_close(_soft(labels), soft)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_weights_of_mixup_are_betas(alpha: float) -> None:
    drawn = ops.draw_mixes(AugmentConfig(mixup=alpha), 32, STEPS, 0, 1)
    weights = torch.tensor([mix.weight for mix in drawn if mix and mix.box is None])
    assert len(weights) == STEPS
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(weights.mean() - 0.5) < 4 * math.sqrt(variance / STEPS)
    assert abs(weights.var() - variance) < 0.05 * variance


def test_boxes_of_cutmix_have_torchvisions_distribution() -> None:
    drawn = ops.draw_mixes(AugmentConfig(cutmix=1.0), 32, STEPS, 0, 1)
    ours = torch.tensor([[*mix.box, mix.weight] for mix in drawn if mix and mix.box])
    assert len(ours) == STEPS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = v2.CutMix(num_classes=4)
        params = [transform.make_params([torch.empty(1, 3, 32, 32)]) for _ in range(STEPS)]
    boxes = [p["box"] for p in params]
    theirs = torch.tensor([[y1, x1, y2, x2] for x1, y1, x2, y2 in boxes])
    weights = torch.tensor([p["lam_adjusted"] for p in params])
    for a, b in zip(ours.T, [*theirs.T.float(), weights], strict=True):
        error = math.sqrt((a.var() + b.var()) / STEPS)
        assert abs(a.mean() - b.mean()) < 4 * error
        assert abs(a.std() - b.std()) < 4 * error
    area = (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1])
    torch.testing.assert_close(ours[:, 4], 1 - area / 1024)


def test_both_share_the_batches_evenly_and_depend_on_seed_and_epoch() -> None:
    config = AugmentConfig(mixup=0.4, cutmix=1.0)
    drawn = ops.draw_mixes(config, 32, STEPS, 3, 2)
    cuts = sum(mix is not None and mix.box is not None for mix in drawn)
    assert abs(cuts - STEPS / 2) < 4 * math.sqrt(STEPS / 4)
    assert drawn == ops.draw_mixes(config, 32, STEPS, 3, 2)
    assert drawn != ops.draw_mixes(config, 32, STEPS, 3, 3)
    assert drawn != ops.draw_mixes(config, 32, STEPS, 4, 2)
    assert ops.draw_mixes(AugmentConfig(), 32, 3, 0, 1) == [None] * 3


def _learner(micro_batch: int) -> Learner:
    parts = {"data": {"image_size": 12}, "model": {"cnn": {"filters": [4]}}}
    runtime = {"precision": "float32", "memory_format": "contiguous"}
    config = TrainConfig.parse({**parts, "runtime": runtime, "label_smoothing": 0.1})
    torch.manual_seed(0)
    return Learner(config, classes=4, device=torch.device("cpu"), micro_batch=micro_batch)


class Reader(nn.Module):
    """Sees the class in the brightness of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return -self.scale * (pictures.mean((1, 2, 3))[:, None] - torch.arange(4.0)) ** 2


@pytest.mark.parametrize("micro_batch", [5, 2])
@pytest.mark.parametrize(("weight", "hits"), [(0.7, 1.0), (0.5, 1.0), (0.2, 0.0)])
def test_the_loss_gets_both_labels_and_the_larger_weight_counts(
    micro_batch: int, weight: float, hits: float
) -> None:
    learner, means = _learner(micro_batch), RunningMeans(torch.device("cpu"))
    learner.model = Reader()
    learner.use_features(None)
    _, labels = ops.mix_batch(*_batch(), Mix(weight))
    pictures = labels.labels.float()[:, None, None, None].expand(5, 3, 12, 12)
    learner.step((pictures, labels), 1e-3, means)
    logits = learner.model(pictures)
    wanted = functional.cross_entropy(logits, _soft(labels), label_smoothing=0.1)
    loss, top1 = means.read()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert top1 == hits
    (gradient,) = torch.autograd.grad(wanted, learner.model.scale)
    torch.testing.assert_close(learner.model.scale.grad, gradient)


def test_parts_of_mixed_labels_stay_together() -> None:
    _, labels = ops.mix_batch(*_batch(), Mix(0.6))
    parts = labels.tensor_split(2)
    assert [len(part) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.labels for part in parts]), labels.labels)
    assert torch.equal(torch.cat([part.others for part in parts]), labels.labels.roll(1))
