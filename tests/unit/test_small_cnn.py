"""The network of `model.cnn`, held against the same networks written by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo.config.model import CnnConfig
from hpo.config.train import TrainConfig
from hpo.errors import ConfigError
from hpo.training import models


class Niche(nn.Module):
    """Five convolutions, one batch norm, one pool at the very end, one hidden layer."""

    def __init__(self, classes: int, side: int, residual: bool, dropout: float) -> None:
        super().__init__()
        self.residual = residual
        self.first = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=5, stride=1, padding=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
        )
        self.second = nn.Conv2d(256, 256, kernel_size=3, stride=1, padding=1)
        self.third = nn.Sequential(nn.ReLU(), nn.MaxPool2d(kernel_size=8))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(256 * (side // 16) ** 2, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x)
        out = out + x if self.residual else out
        logits: Tensor = self.classifier(self.third(out))
        return logits


NICHE = {
    "filters": [32, 64, 128, 256, 256],
    "kernels": [5, 3],
    "strides": [1, 2, 1],
    "norm": [True, False],
    "pool_sizes": [1, 1, 1, 1, 8],
    "adaptive_pool": 0,
    "hidden": [256],
}


def four(pool: type[nn.Module], last: nn.Module, units: int, dropout: float) -> nn.Module:
    """Four convolutions with batch norm and a pool each, 256 units."""
    layers: list[nn.Module] = []
    for inputs, outputs in [(3, 8), (8, 16), (16, 32), (32, 64)]:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [pool(2)]
    layers += [last, nn.Flatten(), nn.Linear(units, 256), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(256, 196))


FOUR: dict[str, Any] = {"filters": [8, 16, 32, 64], "hidden": [256]}


def built(size: int, classes: int, cnn: dict[str, Any], **fields: Any) -> nn.Module:
    config = TrainConfig.parse({"model": {"cnn": cnn, **fields}}).model
    return models.build(config, classes=classes, image_size=size)


@pytest.mark.parametrize(
    ("size", "cnn", "theirs"),
    [
        (64, NICHE, Niche(7, 64, False, 0.0)),
        (64, {**NICHE, "residual": [False] * 4 + [True]}, Niche(7, 64, True, 0.0)),
        (256, {**NICHE, "residual": [False] * 4 + [True], "dropout": 0.3},
         Niche(7, 256, True, 0.3)),
        (48, {**FOUR, "adaptive_pool": 0, "dropout": 0.4},
         four(nn.MaxPool2d, nn.Identity(), 64 * 9, 0.4)),
        (48, {**FOUR, "adaptive_pool": 0, "pool": "average", "dropout": 0.3},
         four(nn.AvgPool2d, nn.Identity(), 64 * 9, 0.3)),
        (48, {**FOUR, "adaptive_pool": 2, "dropout": 0.4},
         four(nn.MaxPool2d, nn.AdaptiveAvgPool2d(2), 64 * 4, 0.4)),
    ],
    ids=["niche", "residual", "residual_dropout_256px", "max", "average", "adaptive"],
)  # fmt: skip
def test_it_is_the_network_written_by_hand(
    size: int, cnn: dict[str, Any], theirs: nn.Module
) -> None:
    classes = 7 if cnn["filters"][0] == 32 else 196
    ours = built(size, classes, cnn)
    mine, their_state = ours.state_dict(), theirs.state_dict()
    assert [value.shape for value in mine.values()] == [one.shape for one in their_state.values()]
    for value in their_state.values():  # batch norm's statistics too
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.05)
    ours.load_state_dict(dict(zip(mine, their_state.values(), strict=True)))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
        torch.manual_seed(1)
        trained = ours.train()(images)
        torch.manual_seed(1)
        torch.testing.assert_close(trained, theirs.train()(images))


@pytest.mark.parametrize("size", [8, 9, 23, 30, 31])
@pytest.mark.parametrize("pool", ["max", "average"])
def test_any_size_is_flattened(size: int, pool: str) -> None:
    cnn = {
        "filters": [4, 4, 4],
        "kernels": [3, 5, 7],
        "strides": [2, 1, 3],
        "pool": pool,
        "pool_sizes": [3, 1, 8],
        "adaptive_pool": 0,
    }
    assert built(size, 3, cnn)(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_dropout_of_the_model_stands_in() -> None:
    def rates(**fields: Any) -> list[float]:
        model = built(8, 3, {"filters": [4], "dropout": 0.3}, **fields)
        return [part.p for part in model.modules() if isinstance(part, nn.Dropout)]

    assert (rates(), rates(dropout=0.1)) == ([0.3], [0.1])


def test_a_head_of_ones_own_replaces_the_fully_connected_layers() -> None:
    model = built(8, 3, {"filters": [4], "hidden": [16]}, head={"hidden": [5]})
    sizes = [part.out_features for part in model.modules() if isinstance(part, nn.Linear)]
    assert sizes == [5, 3]
    assert len(models.blocks(model)) == 1


@pytest.mark.parametrize(
    ("cnn", "message"),
    [
        ({"filters": [8, 16], "residual": [False, True]},
         "model.cnn.residual: [false, true]: convolution 1 (from 0) makes 16 channels of 8 with "
         "stride 1: a connection around it needs as many, and stride 1"),
        ({"filters": [8, 8], "residual": [False, True], "strides": [1, 2]},
         "model.cnn.residual: [false, true]: convolution 1 (from 0) makes 8 channels of 8 with "
         "stride 2: a connection around it needs as many, and stride 1"),
        ({"filters": [8], "norm": [True, False]},
         "model.cnn.norm: [true, false]: 1 to 1 items, one per convolution"),
        ({"strides": []}, "model.cnn.strides: []: 1 to 3 items, one per convolution"),
        ({"filters": []}, "model.cnn.filters: []: allowed: an array of whole numbers with 1 "
         "or more of them"),
        ({"kernels": [4]},
         "model.cnn.kernels.0: 4: allowed: 1, 3, 5, ... 31: an even kernel has no middle"),
        ({"pool": "avg"}, 'model.cnn.pool: "avg": did you mean \'average\'?'),
        ({"norm": [1]}, "model.cnn.norm.0: 1: allowed: true or false"),
        ({"filter": [8]}, "model.cnn.filter: unknown key; did you mean 'filters'?"),
    ],
)  # fmt: skip
def test_lists_that_do_not_go_together(cnn: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse({"model": {"cnn": cnn}})
    assert str(caught.value) == message


def test_the_defaults_average_over_the_whole_picture() -> None:
    assert CnnConfig().adaptive_pool == 1
    model = built(32, 3, {})
    assert [part.out_features for part in model.modules() if isinstance(part, nn.Linear)] == [3]
