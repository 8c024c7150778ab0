"""Networks of timm: built, with their blocks and classifier, and their weights and normalisation.

timm is imported where one is used: an extra, and a second of start-up.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import Tensor, nn

from hpo.config.base import TIMM
from hpo.config.model import ModelConfig
from hpo.errors import ConfigError, DataError, nearest
from hpo.training import timm_names

FILTERS = ("checkpoint_filter_fn", "_filter_fn", "pretrained_filter_fn")
"""Functions of a module of timm's that bring files of weights to its networks' names and sizes."""
MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


def _timm(architecture: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        timm_names.refuse_missing(architecture)
    return timm


def create(config: ModelConfig, *, classes: int, image_size: int) -> nn.Module:
    """Return the network `timm:NAME` with random weights, for these classes. Raises ConfigError for
    an unknown name or tag, and for options that it does not take."""
    timm = _timm(config.architecture)
    name, _ = timm_names.split(config.architecture)
    if not timm.is_model(name):
        message = f"unknown model of timm; {nearest(name, timm.list_models())}"
        raise ConfigError(f"{config.architecture!r}: {message}", key="model.architecture")
    options = dict(config.options)
    if config.dropout is not None:
        options["drop_rate"] = config.dropout
    if getattr(_settings(config), "fixed_input_size", False):
        options["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key} = {value}" for key, value in options.items()) or "no options"
        raise ConfigError(
            f"{config.architecture!r} cannot be built with {given}: {error}",
            key="model.architecture",
        ) from error
    return model


def _settings(config: ModelConfig) -> Any:
    """Return what timm says about the weights of `config`, or of the architecture's default; None
    if nothing."""
    timm = _timm(config.architecture)
    try:
        return timm.get_pretrained_cfg(timm_names.full_name(config.architecture, config.weights))
    except RuntimeError as error:
        raise ConfigError(f"{config.architecture!r}: {error}", key="model.architecture") from error


def normalization(config: ModelConfig) -> MeanStd | None:
    """Return mean and deviation, of red, green and blue in 0..1, with which the weights were
    trained; None if timm does not say."""
    found = _settings(config)
    return None if found is None else (tuple(found.mean), tuple(found.std))


def parts(model: nn.Module, architecture: str) -> tuple[list[str], str]:
    """Return the module names of the blocks, and of the classifier.

    Blocks are what timm's own coarse grouping counts (stages of a convolutional network, layers of
    a transformer), or else the network's children. Raises ConfigError for a classifier that is not
    one layer, such as that of a network with a head for distillation.
    """
    found: Any = model.get_classifier()  # type: ignore[operator]
    inside = list(found.modules()) if isinstance(found, nn.Module) else []
    layers = [one for one in inside if isinstance(one, nn.Linear | nn.Conv2d)]
    if len(layers) != 1:
        raise ConfigError(
            f"{architecture!r}: its classifier is {type(found).__name__}, not one linear layer: "
            "choose another, or build it in a function of your own",
            key="model.architecture",
        )
    head = next(path for path, part in model.named_modules() if part is layers[0])
    patterns = _patterns(model)
    paths = [path for path, _ in model.named_modules()
             if any(re.fullmatch(one, path) for one in patterns)]  # fmt: skip
    children = [path for path, _ in model.named_children() if path != head.split(".")[0]]
    return paths or children, head


def _patterns(model: nn.Module) -> list[str]:
    """Return patterns of the names of blocks; those that timm pins to an end are no blocks."""
    try:
        given: Any = model.group_matcher(coarse=True)["blocks"]  # type: ignore[operator]
        return [given] if isinstance(given, str) else [one for one, end in given if end is None]
    except (AttributeError, KeyError, TypeError):  # it has none, or a function of names
        return []


def fitted(state: dict[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """Return tensors of a file as `model` has them: renamed from the authors' names, position
    embeddings interpolated to its size of images. Raises DataError where that fails."""
    module = sys.modules[type(model).__module__]
    function = next((vars(module)[name] for name in FILTERS if name in vars(module)), None)
    if function is None:
        return state
    both = len(inspect.signature(function).parameters) > 1
    try:
        return dict(function(state, model) if both else function(state))
    except (LookupError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise DataError(
            f"model.weights: {source} does not fit this {TIMM}{type(model).__name__}: {error}"
        ) from error
