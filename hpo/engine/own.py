"""What users bring as `module:function`, from their own Python path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hpo.engine import modules
from hpo.errors import ConfigError


def call_user_function(
    function: Callable[..., Any], what: str, key: str, *args: Any, **options: Any
) -> Any:
    """What `function` returns; whatever it raises becomes a ConfigError for the field `key` that
    says `what` raised."""
    try:
        return function(*args, **options)
    except torch.OutOfMemoryError:  # training goes on with smaller parts of the batch
        raise
    except Exception as error:
        raise ConfigError(f"{what} raised {modules.describe_error(error)}", key=key) from error


def build_user_model(
    name: str, options: Mapping[str, Any], *, classes: int, image_size: int
) -> nn.Module:
    """The network that the user's function `name` returns for these sizes and `options`, run once
    on two black pictures. Raises ConfigError where that fails or gives anything but (2, classes)
    logits."""
    key = "model.architecture"
    function = modules.load(name, key)
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
    """Module names of the blocks and of the head in a network of the user's: the items of its
    attribute `blocks`, or else the children of its `features`; and its last linear layer.

    Raises ConfigError where there is no linear layer, or where `blocks` is not of its modules.
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
