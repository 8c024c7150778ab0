"""Networks in two parts: together they are the network, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.config.model import ModelConfig
from hpo.training import models
from hpo.training.learner import Average
from hpo.training.models import FAMILIES, Family
from hpo.training.partition import PackedTensor, Partition, partition
from hpo.training.tracing import MORE, CannotPartition
from tests.harness import networks

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


def users(make: Callable[[], nn.Module]) -> nn.Module:
    """As `models.build` gives a network of the user's."""
    model = make()
    places, head = models.user_model_parts(model, "nets:build")
    vars(model)[models._OWN] = Family("|".join(map(models.re.escape, places)), head)
    return model


def noise(size: int) -> Tensor:
    return torch.randn(MORE, 3, size, size) * torch.tensor([1.0, 0.5, 4.0]).view(-1, 1, 1, 1)


def cut(model: nn.Module, trainable_blocks: Any, size: int, most: int = 10**9) -> Any:
    """The partition and the frozen modules."""
    frozen = models.set_trainable(model, trainable_blocks)
    before = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    state, images = torch.get_rng_state(), noise(size)
    torch.set_rng_state(state)
    found = partition(model, frozen, images, max_bytes=most)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == before[1]
    assert getattr(model, "seen", None) is None
    assert before[0].keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    return found, frozen


def learned(network: nn.Module, model: nn.Module, frozen: list[nn.Module], images: Tensor) -> Any:
    """What `network` gives in training, and all that has changed by a step."""
    model.train()
    for part in frozen:
        part.eval()
    torch.manual_seed(3)
    logits = network(images)
    logits.square().sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"logits": logits, "chance": torch.get_rng_state()} | gradients | model.state_dict()


def assert_same(found: Partition, model: nn.Module, frozen: list[nn.Module], size: int) -> None:
    """The two parts are the network in evaluation and in training."""
    images = torch.rand(4, 3, size, size)
    twin = copy.deepcopy(model)
    names = {id(part): name for name, part in model.named_modules()}
    others = [twin.get_submodule(names[id(part)]) for part in frozen]
    model.eval(), twin.eval()
    with torch.no_grad():
        rows = found.prefix(model).eval()(images)
        assert rows.dtype == torch.uint8
        assert rows.shape == (4, found.packing.size)
        assert torch.equal(found.suffix(model)(rows), twin(images))
    ours = learned(found.suffix(model), model, frozen, rows)
    theirs = learned(twin, twin, others, images)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def shapes(found: Partition) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in found.packing.leaves if isinstance(leaf, PackedTensor)]


QUICK = ("resnet18", "mobilenet_v2")
HEAD = {"hidden": [4], "batch_norm": True}


@pytest.mark.parametrize(
    ("architecture", "trainable_blocks", "head"),
    [
        *((one, *how) for one in QUICK for how in ((0, None), (1, None), (0, HEAD))),
        *(
            pytest.param(one, blocks, None, marks=pytest.mark.slow)
            for one in SMALLEST
            if one not in QUICK
            for blocks in (0, 1)
        ),
    ],
)
def test_the_parts_are_the_network(architecture: str, trainable_blocks: int, head: Any) -> None:
    model, size = build(architecture, head=head), SMALLEST[architecture]
    found, frozen = cut(model, trainable_blocks, size)
    assert found.obstacle is None
    prefix = found.prefix(model)
    assert not any(weight.requires_grad for weight in prefix.parameters())
    in_prefix = {id(weight) for weight in prefix.parameters()}
    for part in frozen:  # nothing frozen is behind the cut
        assert all(id(weight) in in_prefix for weight in part.parameters())
    assert_same(found, model, frozen, size)


@pytest.mark.slow
def test_every_family_is_tried() -> None:
    assert {type(build(name)).__name__ for name in SMALLEST} == set(FAMILIES)


@pytest.mark.parametrize(
    ("architecture", "trainable_blocks", "shape"),
    [
        ("mobilenet_v2", 0, (1280,)),
        ("mobilenet_v2", 8, (64, 2, 2)),
        ("mobilenet_v2", {"first": 10}, None),
        ("mobilenet_v2", "all", None),
        ("resnet18", 0, (512,)),
        ("resnet18", 1, (256, 2, 2)),
        ("resnet18", {"first": 1}, (64, 8, 8)),
        ("googlenet", 0, (1024,)),
        ("vit_b_32", 0, (768,)),
        ("vit_b_32", 2, (2, 768)),
    ],
)
def test_where_the_cut_is(architecture: str, trainable_blocks: Any, shape: Any) -> None:
    found, _ = cut(build(architecture), trainable_blocks, SMALLEST[architecture])
    assert (found and shapes(found)) == (shape and [shape])


OWN = [
    (networks.Plain, 0, [(96,)]),
    (networks.sequential, 0, [(4,)]),
    (networks.sequential, 1, [(4, 8, 8)]),
    (networks.Skips, 0, [(4,)]),
    (networks.Skips, 1, [(4, 8, 8)]),
    (networks.DropoutBetween, 0, [(4, 8, 8)]),
    (networks.DropoutBetween, 1, [(4, 8, 8)]),
    (networks.Dense, 0, [(4,)]),
    (networks.Dense, 1, [(4, 8, 8), (4, 8, 8)]),
    (networks.TwoSizes, 1, [(3, 8, 8), (4, 8, 8), (4, 4, 4)]),
    (networks.Reshapes, 0, [(4,)]),
    (networks.Reshapes, 1, [(4, 8, 8)]),
    (networks.WithoutGradients, 1, [(4, 8, 8)]),
    (networks.Shared, 1, [(4, 8, 8)]),
    (networks.Normalizes, 0, [(4,)]),
    (networks.Normalizes, 2, [(4, 8, 8)]),
    (networks.Counts, 0, [(4, 8, 8)]),
    (networks.Dictionary, 1, [(4, 8, 8), (4, 8, 8)]),
    (networks.Parametrized, 0, [(4,)]),
    (networks.Hooked, 0, [(4,)]),
    (networks.Hooked, 1, [(4, 8, 8)]),
    (networks.Tokens, 0, [(8,)]),
    (networks.Tokens, 1, [(5, 8)]),
    (networks.Noisy, 0, [(4, 8, 8)]),
    (networks.BatchStatistics, 0, [(4, 8, 8)]),
    (networks.Remembers, 1, [(4, 8, 8)]),
    (networks.MakesTensors, 0, [(4,)]),
    (networks.MakesTensors, 1, [(4, 8, 8)]),
    (networks.Values, 0, [(8,)]),
    (networks.ByShape, 0, [(4,)]),
    (networks.ByShape, 1, [(4, 8, 8)]),
    (networks.ChangesLists, 0, [(4,)]),
    (networks.ChangesLists, 1, [(4, 8, 8)]),
    (networks.Encoder, 0, [(8,)]),
    (networks.Encoder, 1, [(4, 8)]),
    (networks.Encapsulated, 0, [(4,)]),
    (networks.Encapsulated, 1, [(4, 8, 8)]),
]


@pytest.mark.parametrize(("make", "trainable_blocks", "crossing"), OWN)
def test_ones_own(make: Any, trainable_blocks: int, crossing: list[tuple[int, ...]]) -> None:
    model = users(make)
    found, frozen = cut(model, trainable_blocks, 8)
    assert shapes(found) == crossing
    assert_same(found, model, frozen, 8)


@pytest.mark.parametrize(
    ("make", "trainable_blocks", "reason"),
    [
        (networks.ByContents, 0, "its forward branches on the contents or the number"),
        (networks.BySingle, 0, "its forward branches on the contents or the number"),
        (networks.Alternates, 0, "its forward changes Alternates.calls"),
        (networks.Chance, 0, "it draws random numbers that do not depend on the images"),
        (networks.LearnsWithout, 1, "torch.no_grad or autocast surrounds trainable layers"),
        (networks.MonteCarlo, 0, "dropout draws random numbers"),
        (networks.CentresBatch, 0, "its output for an image depends on the rest of the batch"),
    ],
)
def test_what_cannot_be_cut_is_said(make: Any, trainable_blocks: int, reason: str) -> None:
    with pytest.raises(CannotPartition) as told:
        cut(users(make), trainable_blocks, 8)
    assert str(told.value).startswith(reason)
    assert "\n" not in str(told.value)


def test_a_part_that_cannot_be_traced_stays_whole() -> None:
    model = users(networks.Straddling)
    found, frozen = cut(model, 1, 8)
    assert shapes(found) == [(4, 8, 8)]
    assert found.obstacle is not None
    assert found.obstacle.startswith("Mixed cannot be traced (its forward branches on the contents")
    assert_same(found, model, frozen, 8)


@pytest.mark.parametrize(("most", "crossing"), [(10_000, [(8, 8, 8)]), (2047, [(4, 8, 8)])])
def test_the_cut_moves_back_to_what_is_worth_its_bytes(
    most: int, crossing: list[tuple[int, ...]]
) -> None:
    model = nn.Sequential(networks.convolution(3, 4), networks.convolution(4, 8), nn.Dropout(),
                          nn.Flatten(), nn.Linear(512, 3))  # fmt: skip
    model.blocks = [model[0], model[1]]  # type: ignore[assignment]
    found, frozen = cut(users(lambda: model), 0, 8, most)
    assert shapes(found) == crossing
    assert_same(found, model, frozen, 8)
    with pytest.raises(
        CannotPartition, match="2,048 bytes for an image are too many to be worth caching"
    ):
        cut(model, 0, 8, 1023)


def test_an_average_of_the_network_has_the_same_cut() -> None:
    model = users(networks.Skips)
    found, _ = cut(model, 1, 8)
    average = Average(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(weight.requires_grad * 0.1)
        average.update(model)
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        rows = found.prefix(model).eval()(images)
        assert torch.equal(found.suffix(average.model)(rows), average.model(images))
        assert not torch.equal(found.suffix(average.model)(rows), found.suffix(model).eval()(rows))
