"""Networks as Python code of torch and torchvision alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from textwrap import indent
from typing import Any

import torch
from torch import nn

from hpo.config.model import TORCHVISION_ARCHITECTURES, ModelConfig
from hpo.training import models


class NotPlain(Exception):
    """A part of a network that torch.nn and torchvision do not have; its message names it."""


def network_code(
    config: ModelConfig, model: nn.Module, *, classes: int, image_size: int
) -> tuple[str, str]:
    """Return the statements that build the network `model`, which `models.build` made of `config`,
    and the source of the class that they need, if any. Raises NotPlain."""
    if isinstance(model, models.SmallCnn):
        named = ",\n".join(f"{name}={_code(part)}" for name, part in model.named_children())
        body = f"return nn.Sequential(\n    OrderedDict(\n{indent(named, ' ' * 8)},\n    )\n)"
        return body, inspect.getsource(models.Block)
    if config.architecture not in TORCHVISION_ARCHITECTURES:
        raise NotPlain(config.architecture)
    from torchvision.models import get_model

    with torch.device("meta"):  # shapes alone
        options = _options(config, classes, image_size)
        plain = get_model(config.architecture, weights=None, **options)
    lines = [f"model = {builder_code(config, classes=classes, image_size=image_size)}"]
    for path, text in _changes(model, plain):
        lines.append(f'model.set_submodule("{path}", {text})')
    return "\n".join([*lines, "return model"]), ""


def builder_code(config: ModelConfig, *, classes: int, image_size: int) -> str:
    """Return the call of torchvision that builds an architecture of its own."""
    options = _options(config, classes, image_size).items()
    given = ", ".join(f"{name}={value!r}" for name, value in options)
    return f"torchvision.models.{config.architecture}({given})"


def _options(config: ModelConfig, classes: int, image_size: int) -> dict[str, Any]:
    options = models.torchvision_options(config, image_size)
    if "init_weights" in options:
        options["init_weights"] = False  # slow, and the weights are loaded right after
    return {"num_classes": classes, **options}


def _changes(model: nn.Module, plain: nn.Module, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the code of each part of `model` in which it differs from `plain`."""
    if _equal(model, plain):
        return
    children, others = dict(model.named_children()), dict(plain.named_children())
    if type(model) is type(plain) and children and children.keys() == others.keys():
        for name, child in children.items():
            yield from _changes(child, others[name], f"{path}.{name}" if path else name)
    else:
        yield path, _code(model, plain, path)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules compute the same, given the same weights, in eval mode."""
    if isinstance(one, models.DropoutLinear):
        return type(other) is nn.Linear and _code(one) == _code(other)
    return type(one) is type(other) and repr(one) == repr(other)


def _code(module: nn.Module, plain: nn.Module | None = None, path: str = "") -> str:
    """Return the expression that builds `module`; a part of no class of torch.nn is taken from its
    place in `plain`, at `path` of the variable `model`. Raises NotPlain if it is not there."""
    if isinstance(module, models.Block):
        norm = not isinstance(module.norm, nn.Identity)
        return f"Block({_code(module.conv)}, {norm}, {module.residual}, {_code(module.pool)})"
    if type(module) is nn.Sequential:
        others = dict(plain.named_children()) if plain is not None else {}
        parts = ",\n".join(
            _code(child, others.get(name), f"{path}.{name}")
            for name, child in module.named_children()
        )
        return f"nn.Sequential(\n{indent(parts, ' ' * 4)},\n)"
    if isinstance(module, nn.Linear):  # maybe with dropout, which acts in training alone
        bias = module.bias is not None
        return f"nn.Linear({module.in_features}, {module.out_features}, bias={bias})"
    if type(module).__module__.startswith("torch.nn.modules.") and not [*module.children()]:
        return f"nn.{module!r}"
    if plain is not None and _equal(module, plain):
        return f'model.get_submodule("{path}")'
    raise NotPlain(type(module).__name__)
