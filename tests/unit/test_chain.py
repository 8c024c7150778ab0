"""Networks as chains of steps, and where the frozen beginning ends."""

from typing import Any

import pytest
import torch
from torch import nn

from hpo.definition.model import ModelConfig
from hpo.engine import models
from hpo.engine.chain import STEPS, frozen_steps, steps

SMALLEST = {
    "small_cnn": 8,
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vgg11": 32,
    "vit_b_32": 32,
}
"""A network of each family, and a size that it takes."""


def build(architecture: str, **fields: Any) -> nn.Module:
    config = ModelConfig.model_validate({"architecture": architecture, **fields})
    return models.build(config, classes=3, image_size=SMALLEST[architecture])


def cut(model: nn.Module, trainable_blocks: Any) -> int:
    return frozen_steps(steps(model), models.set_trainable(model, trainable_blocks))


def test_every_family_is_spelt_out() -> None:
    assert set(STEPS) == set(models.FAMILIES)
    assert {type(build(name)) for name in SMALLEST} == set(STEPS)


@pytest.mark.parametrize("architecture", SMALLEST)
@pytest.mark.parametrize("head", [None, {"hidden": [4]}])
def test_the_steps_are_the_forward(architecture: str, head: Any) -> None:
    model = build(architecture, head=head).eval()
    size = SMALLEST[architecture]
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(nn.Sequential(*steps(model))(images), model(images))


@pytest.mark.parametrize("architecture", SMALLEST)
def test_what_is_learned_stays_behind_the_cut(architecture: str) -> None:
    model = build(architecture)
    assert cut(model, "all") == 0
    for trainable in (0, 1):
        count = cut(model, trainable)
        assert count > 0
        begun, rest = steps(model)[:count], steps(model)[count:]
        assert not any(weight.requires_grad for step in begun for weight in step.parameters())
        learned = {id(weight) for step in rest for weight in step.parameters()}
        assert learned >= {id(one) for one in model.parameters() if one.requires_grad}
        random = nn.Dropout | nn.modules.batchnorm._BatchNorm
        frozen = {id(p) for part in models.set_trainable(model, trainable) for p in part.modules()}
        for step in begun:
            for part in step.modules():
                assert not isinstance(part, random) or id(part) in frozen


@pytest.mark.parametrize(
    ("architecture", "trainable_blocks", "shape"),
    [
        ("mobilenet_v2", 0, (1280,)),
        ("mobilenet_v2", 8, (64, 2, 2)),
        ("mobilenet_v2", {"first": 10}, None),
        ("resnet18", 0, (512,)),
        ("resnet18", 1, (256, 2, 2)),
        ("resnet18", {"first": 1}, (64, 8, 8)),
        ("googlenet", 0, (1024,)),
        ("vit_b_32", 0, (768,)),
        ("vit_b_32", 2, (2, 768)),
    ],
)
def test_where_the_cut_is(architecture: str, trainable_blocks: Any, shape: Any) -> None:
    model = build(architecture)
    count = cut(model, trainable_blocks)
    if shape is None:
        assert count == 0
        return
    size = SMALLEST[architecture]
    begun = nn.Sequential(*steps(model)[:count]).eval()
    assert begun(torch.rand(2, 3, size, size)).shape == (2, *shape)


class Unknown(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_an_unknown_network_is_not_cut() -> None:
    assert steps(Unknown()) == []
