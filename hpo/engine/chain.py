"""A network as a chain of steps: how its frozen beginning is told from the rest.

`STEPS` spells out what the `forward` of each kind of network does, one step after another; both
halves of a cut chain share their modules with the network, whose own names of weights stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models as zoo
from torchvision.models.swin_transformer import Permute

from hpo.engine.small_cnn import SmallCnn


class Do(nn.Module):
    """A step of `forward` that is a plain function."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._name, self._function = name, function

    def forward(self, images: Tensor) -> Tensor:
        return self._function(images)

    def extra_repr(self) -> str:
        return self._name


class Tokens(nn.Module):
    """What a vision transformer does before its layers: patches, class token, positions."""

    def __init__(self, model: zoo.VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = model.conv_proj
        self.class_token, self.pos_embedding = model.class_token, model.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).permute(0, 2, 1)
        token = self.class_token.expand(len(images), -1, -1)
        tokens: Tensor = torch.cat([token, patches], dim=1) + self.pos_embedding
        return tokens


Step = str | Callable[[nn.Module], nn.Module]
"""The name of a module (plain Sequentials are opened), or what makes a step of the network."""


NOTHING = nn.Sequential()


def _do(name: str, function: Callable[[Tensor], Tensor]) -> Step:
    return lambda model: Do(name, function)


def _transformed(model: nn.Module) -> nn.Module:
    """GoogLeNet's and Inception's change of normalisation, where it is on."""
    assert isinstance(model, zoo.GoogLeNet | zoo.Inception3)
    return Do("transform_input", model._transform_input) if model.transform_input else NOTHING


def _tokens(model: nn.Module) -> nn.Module:
    assert isinstance(model, zoo.VisionTransformer)
    return Tokens(model)


FLATTEN = _do("flatten", partial(torch.flatten, start_dim=1))
MEAN = _do("mean", partial(torch.mean, dim=(2, 3)))
POOL = _do("pool", partial(functional.adaptive_avg_pool2d, output_size=1))
RELU = _do("relu", functional.relu)
FIRST = _do("first token", lambda tokens: tokens[:, 0])

STEPS: dict[type[nn.Module], tuple[Step, ...]] = {
    SmallCnn: ("features", "avgpool", "flatten", "classifier"),
    zoo.AlexNet: ("features", "avgpool", FLATTEN, "classifier"),
    zoo.ConvNeXt: ("features", "avgpool", "classifier"),
    zoo.DenseNet: ("features", RELU, POOL, FLATTEN, "classifier"),
    zoo.EfficientNet: ("features", "avgpool", FLATTEN, "classifier"),
    zoo.GoogLeNet: (
        *(_transformed, "conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
        *("inception3a", "inception3b", "maxpool3"),
        *(f"inception4{letter}" for letter in "abcde"),
        *("maxpool4", "inception5a", "inception5b", "avgpool", FLATTEN, "dropout", "fc"),
    ),
    zoo.Inception3: (
        *(_transformed, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
        *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
        *(f"Mixed_5{letter}" for letter in "bcd"),
        *(f"Mixed_6{letter}" for letter in "abcde"),
        *(f"Mixed_7{letter}" for letter in "abc"),
        *("avgpool", "dropout", FLATTEN, "fc"),
    ),
    zoo.MaxVit: ("stem", "blocks", "classifier"),
    zoo.MNASNet: ("layers", MEAN, "classifier"),
    zoo.MobileNetV2: ("features", POOL, FLATTEN, "classifier"),
    zoo.MobileNetV3: ("features", "avgpool", FLATTEN, "classifier"),
    zoo.RegNet: ("stem", "trunk_output", "avgpool", FLATTEN, "fc"),
    zoo.ResNet: (
        *("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"),
        *("avgpool", FLATTEN, "fc"),
    ),
    zoo.ShuffleNetV2: ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5", MEAN, "fc"),
    zoo.SqueezeNet: ("features", "classifier", FLATTEN),
    zoo.SwinTransformer: ("features", "norm", "permute", "avgpool", "flatten", "head"),
    zoo.VGG: ("features", "avgpool", FLATTEN, "classifier"),
    zoo.VisionTransformer: (
        *(_tokens, "encoder.dropout", "encoder.layers", "encoder.ln", FIRST, "heads"),
    ),
}  # fmt: skip

_STILL = (
    *(Do, Permute, nn.Identity, nn.Flatten, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU),
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d),
)
"""Steps without weights that do the same in training as in evaluation."""


def steps(model: nn.Module) -> list[nn.Module]:
    """The steps of which `model.forward` is made; none for a kind of network not in `STEPS`."""
    found = next((spelt for kind, spelt in STEPS.items() if type(model) is kind), ())
    made = (model.get_submodule(one) if isinstance(one, str) else one(model) for one in found)
    return list(_opened(made))


def beyond(model: nn.Module, cut: int) -> nn.Module:
    """What is left of `model` behind its first `cut` steps; the modules and their weights are the
    same ones."""
    return nn.Sequential(*steps(model)[cut:]) if cut else model


def _opened(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential or type(module) is nn.ModuleList:
            yield from _opened(module)
        else:
            yield module


def frozen_steps(chain: Iterable[nn.Module], frozen: Iterable[nn.Module]) -> int:
    """How many steps at the beginning of `chain` give the same for the same image, whatever is
    learned: `frozen` (as from `models.set_trainable`) are in eval mode, and nothing else there has
    weights or randomness."""
    known = {id(part) for module in frozen for part in module.modules()}
    count = 0
    for step in chain:
        if any(weight.requires_grad for weight in step.parameters()):
            break
        leaves = [part for part in step.modules() if not any(True for _ in part.children())]
        if not all(id(leaf) in known or isinstance(leaf, _STILL) for leaf in leaves):
            break
        count += 1
    return count
