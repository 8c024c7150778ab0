"""Networks by name: their head, their stem, the small CNN, networks of the user's.

The differences between architectures are in one table, `FAMILIES`: where the blocks are, where the
head is, and what adapts the stem to images of 32 pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.config.base import is_function_name, is_timm
from hpo.config.model import (
    COLOURS,
    TORCHVISION_ARCHITECTURES,
    CnnConfig,
    HeadConfig,
    ModelConfig,
    repeated,
)
from hpo.config.train import TrainConfig
from hpo.data import user_code
from hpo.data.dataset import Data
from hpo.errors import ConfigError
from hpo.training import pretrained as weights
from hpo.training import timm_models


def call_user_function(
    function: Callable[..., Any], what: str, key: str, *args: Any, **options: Any
) -> Any:
    """Return the result of `function`; anything that it raises becomes a ConfigError for the field
    `key`, saying that `what` raised."""
    try:
        return function(*args, **options)
    except torch.OutOfMemoryError:  # training continues with smaller micro-batches
        raise
    except Exception as error:
        raise ConfigError(f"{what} raised {user_code.describe_error(error)}", key=key) from error


def build_user_model(
    name: str, options: Mapping[str, Any], *, classes: int, image_size: int
) -> nn.Module:
    """Return the network that the user's function `name` builds for these sizes and `options`,
    after a trial run on two black images. Raises ConfigError if that fails or yields anything but
    (2, classes) logits."""
    key = "model.architecture"
    function = user_code.load(name, key)
    model = call_user_function(
        function, repr(name), key, **options, classes=classes, image_size=image_size
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} returned {type(model).__name__}, not a nn.Module", key=key)
    images = torch.zeros(2, 3, image_size, image_size)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = call_user_function(model, f"the network of {name!r}", key, images)
    model.train(training)
    shape = tuple(getattr(logits, "shape", ()))
    if not isinstance(logits, torch.Tensor) or shape != (2, classes):
        got = f"a tensor of shape {shape}" if shape else type(logits).__name__
        raise ConfigError(
            f"the network of {name!r} made {got} of 2 images; allowed: logits of shape "
            f"(2, {classes}), one for each class",
            key=key,
        )
    return model


def user_model_parts(model: nn.Module, name: str) -> tuple[list[str], str]:
    """Return the module names of the blocks and of the head in a user's network: the items of its
    attribute `blocks`, or else the children of its `features`; and its last linear layer.

    Raises ConfigError if there is no linear layer, or if `blocks` are not modules of the network.
    """
    linear = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"the network of {name!r} has no nn.Linear; its head is its last linear layer",
            key="model.architecture",
        )
    given = getattr(model, "blocks", None)
    if given is None:
        features = getattr(model, "features", None)
        given = list(features.children()) if isinstance(features, nn.Module) else []
    paths = {id(part): path for path, part in model.named_modules()}
    try:
        return [paths[id(one)] for one in given], linear[-1]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"`blocks` of the network of {name!r} is not a list of modules in it",
            key="model.architecture",
        ) from error


class SmallCnn(nn.Module):
    """The convolutions of `config`, a pool to a fixed size or none, fully connected layers with
    dropout before the last. Maps (B, 3, S, S) to (B, classes) logits, with S = `image_size` of any
    size: convolutions are padded and pools round up."""

    def __init__(self, config: CnnConfig, classes: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*_blocks(config))
        pooled = config.adaptive_pool
        self.avgpool = nn.AdaptiveAvgPool2d(pooled) if pooled else nn.Identity()
        self.flatten = nn.Flatten()
        side = pooled or _last_side(config, image_size)
        sizes = (config.filters[-1] * side * side, *config.hidden)
        self.classifier = _cnn_classifier(sizes, classes, config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, classes) logits."""
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(images))))
        return logits


class Block(nn.Module):
    """One convolution followed by batch norm, residual connection, ReLU and pool."""

    def __init__(self, conv: nn.Conv2d, norm: bool, residual: bool, pool: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.residual = residual
        self.relu = nn.ReLU(inplace=True)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block to (B, C, H, W)."""
        out = self.norm(self.conv(images))
        if self.residual:
            out = out + images
        pooled: Tensor = self.pool(self.relu(out))
        return pooled


def _blocks(config: CnnConfig) -> list[Block]:
    count = len(config.filters)
    inputs = (COLOURS, *config.filters)
    kernels, strides = repeated(config.kernels, count), repeated(config.strides, count)
    norm, residual = repeated(config.norm, count), repeated(config.residual, count)
    pools = repeated(config.pool_sizes, count)
    return [
        Block(
            nn.Conv2d(
                inputs[i], config.filters[i], kernels[i], strides[i], padding=kernels[i] // 2
            ),
            norm[i],
            residual[i],
            _pool(config.pool, pools[i]),
        )
        for i in range(count)
    ]


def _pool(kind: str, size: int) -> nn.Module:
    if size == 1:
        return nn.Identity()
    if kind == "max":
        return nn.MaxPool2d(size, ceil_mode=True)
    return nn.AvgPool2d(size, ceil_mode=True)


def _last_side(config: CnnConfig, side: int) -> int:
    """Return the side of the last feature map: an odd kernel with its padding, and a pool that
    rounds up, divide it by their stride, rounded up."""
    count = len(config.filters)
    steps = zip(repeated(config.strides, count), repeated(config.pool_sizes, count), strict=True)
    for stride, pool in steps:
        side = -(-side // stride)
        side = -(-side // pool)
    return side


def _cnn_classifier(sizes: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(sizes[-1], classes))


@dataclass(frozen=True)
class Family:
    """Module names of the parts of a family of networks.

    `blocks` is a pattern that matches the full names of its blocks. `stem` holds the first
    convolution and, if any, the max-pool after it; empty: the stem suits small images as it is;
    None: it cannot be adapted.
    """

    blocks: str
    head: str
    stem: tuple[str, ...] | None = None


FAMILIES: dict[str, Family] = {
    "SmallCnn": Family(r"features\.\w+", "classifier", ()),
    "AlexNet": Family(r"features\.\w+", "classifier", ("features.0", "features.2")),
    "ConvNeXt": Family(r"features\.\w+", "classifier", ("features.0.0",)),
    "DenseNet": Family(r"features\.\w+", "classifier", ("features.conv0", "features.pool0")),
    "EfficientNet": Family(r"features\.\w+", "classifier", ("features.0.0",)),
    "GoogLeNet": Family(r"inception\w+", "fc", ("conv1.conv", "maxpool1")),
    "Inception3": Family(r"Mixed_\w+", "fc"),
    "MaxVit": Family(r"blocks\.\w+", "classifier"),
    "MNASNet": Family(r"layers\.\w+", "classifier", ("layers.0",)),
    "MobileNetV2": Family(r"features\.\w+", "classifier", ("features.0.0",)),
    "MobileNetV3": Family(r"features\.\w+", "classifier", ("features.0.0",)),
    "RegNet": Family(r"trunk_output\.\w+", "fc", ("stem.0",)),
    "ResNet": Family(r"layer\d", "fc", ("conv1", "maxpool")),
    "ShuffleNetV2": Family(r"stage\d|conv5", "fc", ("conv1.0", "maxpool")),
    "SqueezeNet": Family(r"features\.\w+", "classifier", ("features.0", "features.2")),
    "SwinTransformer": Family(r"features\.\w+", "head"),
    "VGG": Family(r"features\.\w+", "classifier", ()),
    "VisionTransformer": Family(r"encoder\.layers\.\w+", "heads"),
}
"""By the name of the network's class: torchvision, which takes a second to import, is loaded only
for networks of its own."""


NOTHING = r"(?!)"
"""A pattern that no name matches."""
_OWN = "_hpo_family"
"""Attribute of a user's network that holds its Family."""
_KNOWN = ("torchvision.models.", __name__)
"""Where the classes of FAMILIES are."""


class DropoutLinear(nn.Linear):
    """A linear layer with dropout before it, under the parameter names of a plain one."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dropout: float) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """Apply dropout and the linear layer."""
        return super().forward(functional.dropout(input, self.dropout, self.training))


_CHECKED: set[tuple[str, int]] = set()
"""Networks, in words, and sides of images that are known to fit."""


def build(
    config: ModelConfig, *, classes: int, image_size: int, pretrained: bool = True
) -> nn.Module:
    """Build the network that `config` describes; it maps (B, 3, image_size, image_size) float32 to
    (B, classes) logits. Random values come from torch's global generator.

    `pretrained = False` skips `config.weights`, for a state dict that is loaded right after. Raises
    ConfigError if the parts do not fit each other or `image_size`, DataError if `config.weights`
    cannot be loaded or do not fit.
    """
    model = _bare(config, classes, image_size)
    if config.stem == "small":
        _shrink_stem(model, config.architecture)
    replaced = _replace_head(model, config, classes)
    known = repr(config), image_size
    theirs = config.architecture in TORCHVISION_ARCHITECTURES or is_timm(config.architecture)
    if theirs and known not in _CHECKED:
        _check_forward(model, config, image_size)  # the user's own has run already
        _CHECKED.add(known)
    if config.weights is not None and pretrained:
        fit = weights.Fit(head=family(model).head, replaced=replaced, image_size=image_size)
        weights.load_into(model, config.weights, config.architecture, fit)
    return model


def normalized(data: Data, config: TrainConfig) -> Data:
    """Return `data` with the mean and deviation of the model's weights where `config` asks for
    these; images are as they were."""
    if config.data.normalize != "pretrained" or not is_timm(config.model.architecture):
        return data
    mean, std = timm_models.normalization(config.model) or (data.mean, data.std)
    folds = tuple(replace(one, mean=mean, std=std) for one in data.folds)
    return replace(data, mean=mean, std=std, folds=folds)


def family(model: nn.Module) -> Family:
    """Return the Family of `model`, which must come from `build`."""
    if _OWN in vars(model):
        own: Family = vars(model)[_OWN]
        return own
    found = _known_family(model)
    assert found is not None
    return found


def _known_family(model: nn.Module) -> Family | None:
    """Return the Family of a network of torchvision's or ours; None of the user's own."""
    return next((FAMILIES[name] for name in _known_kinds(model) if name in FAMILIES), None)


def _known_kinds(model: nn.Module) -> list[str]:
    """Return the names of those classes of `model` that are torchvision's or ours."""
    kinds = type(model).__mro__
    return [kind.__name__ for kind in kinds if kind.__module__.startswith(_KNOWN)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of `model`, first to last, as counted by `ModelConfig.trainable_blocks`."""
    pattern = re.compile(family(model).blocks)
    named = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    return [module for module in named if any(True for _ in module.parameters())]


def set_trainable(model: nn.Module, trainable_blocks: Any) -> list[nn.Module]:
    """Make only the chosen blocks and the head trainable; return the frozen modules, which have to
    be in eval mode even while the rest trains.

    `trainable_blocks` as in ModelConfig. Modules before the first block (the stem) train only with
    "all"; modules after the last block (a final norm) train together with it. Because nothing in it
    requires a gradient, autograd does not record the frozen prefix. Raises ConfigError if
    `trainable_blocks` asks for more blocks than there are.
    """
    model.requires_grad_(trainable_blocks == "all")
    if trainable_blocks == "all":
        return []
    parts = blocks(model)
    chosen = _chosen(trainable_blocks, len(parts))
    head = model.get_submodule(family(model).head)
    stem, tail = _around(model, parts, head)
    frozen = [part for number, part in enumerate(parts) if number not in chosen]
    frozen += stem
    frozen += [] if len(parts) - 1 in chosen else tail
    for part in [*parts, *tail, head]:
        part.requires_grad_(not any(part is other for other in frozen))
    return frozen


def _chosen(trainable_blocks: Any, count: int) -> range:
    if isinstance(trainable_blocks, int):
        asked, chosen = trainable_blocks, range(count - trainable_blocks, count)
    elif "first" in trainable_blocks:
        asked, chosen = trainable_blocks["first"], range(trainable_blocks["first"])
    else:
        asked = trainable_blocks["stop"]
        chosen = range(trainable_blocks["start"], asked)
    if asked > count:
        raise ConfigError(
            f"{trainable_blocks}: this network has {count} blocks; at most {count}, or 'all'",
            key="model.trainable_blocks",
        )
    return chosen


def _around(
    model: nn.Module, parts: list[nn.Module], head: nn.Module
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules before the first block, and those with parameters after the last one.

    A pool or dropout after the blocks belongs to the head and is never frozen.
    """
    stem: list[nn.Module] = []
    tail: list[nn.Module] = []
    after = False
    inside = {id(part) for part in [*parts, head]}
    for module in _outermost(model, inside):
        if id(module) in inside:
            after = True
        elif not after:
            stem.append(module)
        elif any(True for _ in module.parameters()):
            tail.append(module)
    return stem, tail


def _outermost(module: nn.Module, wanted: set[int]) -> Iterator[nn.Module]:
    """Yield the largest modules, in order, that are wanted or contain none that is."""
    for child in module.children():
        holds = any(id(inner) in wanted for inner in child.modules())
        if holds and id(child) not in wanted:
            yield from _outermost(child, wanted)
        else:
            yield child


def _bare(config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    """Return torchvision's architecture with its own 1,000 classes; or timm's, or the user's."""
    name = config.architecture
    if name == "small_cnn":
        return SmallCnn(config.cnn, classes, image_size)
    if is_timm(name):
        return _timms(config, classes, image_size)
    if is_function_name(name):
        return _users(config, classes, image_size)
    options = torchvision_options(config, image_size)
    from torchvision.models import get_model

    try:
        model: nn.Module = get_model(name, weights=None, **options)
    except ValueError as error:
        raise _wrong_size(name, image_size, str(error)) from error
    return model


def torchvision_options(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the options of torchvision's builder, apart from the number of classes. Raises
    ConfigError for a size of images that the architecture cannot take."""
    name = config.architecture
    if name in ("googlenet", "inception_v3"):
        # torchvision's weights for these two want its own normalisation; its files are .pth, ours
        # are .safetensors and hold what was trained here.
        given = config.weights or ""
        own = bool(given) and not given.endswith(".safetensors")
        return {"aux_logits": False, "init_weights": True, "transform_input": own}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        if image_size % patch:
            raise _wrong_size(name, image_size, f"a multiple of its {patch}-pixel patches")
        return {"image_size": image_size}
    return {"input_size": (image_size, image_size)} if name.startswith("maxvit") else {}


def _users(config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    name = config.architecture
    model = build_user_model(name, config.options, classes=classes, image_size=image_size)
    if _known_family(model) is None:
        _keep_family(model, *user_model_parts(model, name))
    return model


def _timms(config: ModelConfig, classes: int, image_size: int) -> nn.Module:
    model = timm_models.create(config, classes=classes, image_size=image_size)
    _keep_family(model, *timm_models.parts(model, config.architecture))
    return model


def _keep_family(model: nn.Module, places: Sequence[str], head: str) -> None:
    pattern = "|".join(re.escape(place) for place in places)
    setattr(model, _OWN, Family(pattern or NOTHING, head))


def _wrong_size(architecture: str, image_size: int, allowed: str) -> ConfigError:
    message = f"{image_size}: {architecture} cannot take images of this size: {allowed}"
    return ConfigError(message, key="data.image_size")


def _shrink_stem(model: nn.Module, architecture: str) -> None:
    """Replace the first convolution by one of 3 x 3 with stride 1, and the max-pool after it by
    nothing (He et al. 2016, section 4.2: ResNets for CIFAR)."""
    parts = family(model).stem
    if parts is None:
        have = sorted(kind for kind, one in FAMILIES.items() if one.stem is not None)
        raise ConfigError(
            f"'small': {architecture} has none; allowed: 'default', or one of {', '.join(have)}",
            key="model.stem",
        )
    for name in parts[1:]:
        model.set_submodule(name, nn.Identity())
    for name in parts[:1]:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        small = nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        model.set_submodule(name, small)


def _replace_head(model: nn.Module, config: ModelConfig, classes: int) -> str:
    """Replace the classifier of `model`; return the module name of the new part."""
    name = family(model).head
    head = model.get_submodule(name)
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    if config.head is not None:
        kept, inputs = _before_classifier(layers)
        model.set_submodule(name, nn.Sequential(*kept, _own_head(config.head, inputs, classes)))
        return f"{name}.{len(kept)}"
    rate = config.dropout
    if is_timm(config.architecture) or (is_function_name(config.architecture) and rate is None):
        return name  # made for these classes by its function
    if rate is not None and _set_dropout(model, rate):
        rate = None
    names = [path for path, part in model.named_modules() if _is_classifier(path, part, name)]
    last: str = names[-1]
    model.set_submodule(last, _classifier(model.get_submodule(last), classes, rate))
    return last


def _before_classifier(layers: list[nn.Module]) -> tuple[list[nn.Module], int]:
    """Return the layers that only prepare the features (norm, pool, flatten), and the number of
    features."""
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            return kept, layer.in_features
        if isinstance(layer, nn.Conv2d):
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten()], layer.in_channels
        if not isinstance(layer, nn.Dropout):
            kept.append(layer)
    raise AssertionError(f"no classifier in {layers}")


def _own_head(config: HeadConfig, inputs: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, units in enumerate(config.hidden):
        activation = config.activations[min(number, len(config.activations) - 1)]
        rate = config.dropout[min(number, len(config.dropout) - 1)]
        layers.append(nn.Linear(inputs, units))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(units))
        layers.append(nn.ReLU() if activation == "relu" else nn.LeakyReLU(0.01))
        layers.append(nn.Dropout(rate))
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _set_dropout(model: nn.Module, rate: float) -> bool:
    """Set every dropout of the classifier; return False if it has none."""
    places = [model.get_submodule(family(model).head)]
    if not {"GoogLeNet", "Inception3"}.isdisjoint(_known_kinds(model)):
        places.append(model.get_submodule("dropout"))
    dropouts = [
        part for place in places for part in place.modules() if isinstance(part, nn.Dropout)
    ]
    for dropout in dropouts:
        dropout.p = rate
    return bool(dropouts)


def _is_classifier(path: str, part: nn.Module, head: str) -> bool:
    inside = path == head or path.startswith(head + ".")
    return inside and isinstance(part, nn.Linear | nn.Conv2d)


def _classifier(old: nn.Module, classes: int, dropout: float | None) -> nn.Module:
    """Return a layer like `old` with `classes` outputs, and with `dropout` before it if given;
    initialised as in the architecture: a convolution (squeezenet) with small values, otherwise
    torch's default."""
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, kernel_size=1)
        nn.init.normal_(new.weight, std=0.01)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        return new
    assert isinstance(old, nn.Linear)
    bias = old.bias is not None
    if dropout is None:
        return nn.Linear(old.in_features, classes, bias=bias)
    return DropoutLinear(old.in_features, classes, bias=bias, dropout=dropout)


def _check_forward(model: nn.Module, config: ModelConfig, image_size: int) -> None:
    """Run shapes alone through `model`, which takes milliseconds at any size."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, shapes, (images,))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        has_smaller = config.stem != "small" and family(model).stem
        advice = "choose a larger image_size" + (' or model.stem = "small"' if has_smaller else "")
        raise _wrong_size(config.architecture, image_size, f"{advice} ({reason})") from error
    finally:
        model.train(training)
