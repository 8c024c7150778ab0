"""Trained weights for plain torch: what stands in their header, and the load.py beside them.

load.py builds the network from torchvision and `torch.nn` alone, so it works where hpo is not
installed. A network that these cannot spell (a function of the user's) is loaded by hpo instead,
and load.py says so.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from pprint import pformat
from string import Template
from textwrap import indent
from typing import Any

import torch
from torch import nn

import hpo
from hpo.config.data import DataConfig
from hpo.config.model import TORCHVISION_ARCHITECTURES, ModelConfig
from hpo.config.train import TrainConfig
from hpo.io import write_text
from hpo.trained.run import RunMetadata, SeedDir, TrainedRun
from hpo.training import models
from hpo.training.tasks import task_of

WIDTH = 100
"""Columns of the code in load.py."""


class _NotPlain(Exception):
    """A part of a network that torch.nn and torchvision do not have; its message names it."""


def weights_metadata(config: TrainConfig, about: RunMetadata, seed: int) -> dict[str, str]:
    """Return what the header of a seed's weights says of them; lists are JSON."""
    return {
        "seed": str(seed),
        "hpo": hpo.__version__,
        "task": config.task,
        "architecture": config.model.architecture,
        "classes": json.dumps(list(about.classes)),
        "mean": json.dumps(list(about.mean)),
        "std": json.dumps(list(about.std)),
        "image_size": str(config.data.image_size),
        "resize": config.data.resize,
        "resize_size": str(config.data.resize_size),
        "load": "load.py beside this file, or hpo.TrainedModel.load(FOLDER)",
    }


def write_loader(files: SeedDir, config: TrainConfig, about: RunMetadata, model: nn.Module) -> None:
    """Write load.py beside the weights of `model`. Raises DiskFull."""
    write_text(files.loader, loader_text(config, about, model))


def loader_text(config: TrainConfig, about: RunMetadata, model: nn.Module) -> str:
    """Return the load.py of `model`, which must come from `hpo.training.models.build`."""
    what = f"{config.model.architecture}, {len(about.classes)} classes"
    if not task_of(config).averages:
        why = "It is looked up by its features in index.npz"
        return _BY_HPO.substitute(what=what, why=why)
    size, count = config.data.image_size, len(about.classes)
    try:
        network, helper = _network_code(config.model, model, classes=count, image_size=size)
    except _NotPlain as error:
        return _BY_HPO.substitute(what=what, why=f"{error} is not in torch or torchvision")
    return _PLAIN.substitute(
        what=what,
        imports="\n".join(line for word, line in _IMPORTS.items() if word in helper + network),
        size=size,
        count=count,
        classes=pformat(list(about.classes), width=WIDTH - len("CLASSES = "), compact=True),
        mean=tuple(about.mean),
        std=tuple(about.std),
        helper=f"\n\n{helper}" if helper else "",
        network=indent(network, " " * 4),
        opened=_opened(config.data),
        resized=_resized(config.data),
    )


def _opened(config: DataConfig) -> str:
    """Return the lines of load.py that open an image as `config` says."""
    lines = ["image = Image.open(path)"]
    if config.orientation == "exif":
        lines.append("image = ImageOps.exif_transpose(image)")
    if config.background != "ignore":
        lines += [
            "if image.has_transparency_data:",
            '    image = image.convert("RGBA")',
            f'    ground = Image.new("RGBA", image.size, {_quoted(config.background)})',
            "    image = Image.alpha_composite(ground, image)",
        ]
    return indent("\n".join(lines), " " * 4)


def _resized(config: DataConfig) -> str:
    """Return the steps of load.py that bring an image to its size."""
    side = config.image_size
    if config.resize == "squash":
        return f"        transforms.Resize(({side}, {side})),"
    return (
        f"        transforms.Resize({config.resize_size}),\n        transforms.CenterCrop({side}),"
    )


def torch_lines(run: TrainedRun) -> Sequence[str]:
    """Return three lines of Python or less that load the first seed's network, without hpo where
    that is possible; none where the run has no load.py."""
    files, config = run.seeds[0].files, run.config
    if not files.loader.exists():
        return ()
    if "import hpo\n" in files.loader.read_text(encoding="utf-8"):
        return ("import hpo", f"model = hpo.TrainedModel.load({_quoted(run.path)}).networks[0]")
    model = config.model
    unchanged = model.stem == "default" and model.head is None
    if model.architecture in TORCHVISION_ARCHITECTURES and unchanged:
        size, count = config.data.image_size, len(run.classes)
        return (
            "import torchvision, safetensors.torch",
            f"model = {_builder_code(model, classes=count, image_size=size)}",
            f"model.load_state_dict(safetensors.torch.load_file({_quoted(files.weights)}))",
        )
    return ("import runpy", f'model = runpy.run_path({_quoted(files.loader)})["load"]()')


def _quoted(text: Path | str) -> str:
    # A file name that is not UTF-8 holds lone surrogates.
    return json.dumps(str(text), ensure_ascii=not str(text).isprintable())


def use_lines(run: TrainedRun) -> Iterator[str]:
    """Yield how the first seed's network is loaded in Python, and asked without any; nothing where
    the run has no load.py."""
    if lines := torch_lines(run):
        yield f"in Python{', without hpo' * (lines[0] != 'import hpo')}:"
        yield from (f"    {line}" for line in lines)
        yield f"or python {run.seeds[0].files.loader} photo.jpg"


_IMPORTS = {
    "OrderedDict": "from collections import OrderedDict",
    "torchvision": "import torchvision",
    "Tensor": "from torch import Tensor",
    "nn.": "from torch import nn",
}
"""Lines that load.py needs where its network has these words."""

_PLAIN = Template('''"""$what, as hpo trained it.

    python load.py photo.jpg ...      the most likely classes of images
    import load; load.load()          the network, in eval mode

Needs torch, torchvision, safetensors and Pillow. Images of 8 bits a channel.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision import transforms
$imports

CLASSES = $classes
MEAN = $mean
STD = $std
$helper

def network():
    """Return the network with random weights."""
$network


def load(weights=Path(__file__).with_name("weights.safetensors")):
    """Return the trained network: (N, 3, $size, $size) -> logits (N, $count)."""
    model = network()
    model.load_state_dict(load_file(weights))
    return model.eval()


prepare = transforms.Compose(
    [
$resized
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


def open_image(path):
    """Return an image file as RGB, as in training."""
$opened
    return image.convert("RGB")


@torch.no_grad()
def predict(model, path):
    """Return the probability of each class for an image file, (classes,)."""
    return model(prepare(open_image(path))[None]).softmax(dim=1)[0]


if __name__ == "__main__":
    trained = load()
    for name in sys.argv[1:]:
        found = predict(trained, name)
        best = found.argsort(descending=True)[:5].tolist()
        print(name, *(f"{CLASSES[i]} {found[i]:.4f}" for i in best), sep="  ")
''')

_BY_HPO = Template('''"""$what, as hpo trained it.

    python load.py photo.jpg ...      its answers to images
    import load; load.load()          the network, in eval mode

$why, so hpo loads it: run this where hpo (and your own module, if it is one) can be imported.
"""

import sys
from pathlib import Path

import hpo


def load(folder=Path(__file__).parent):
    """Return the trained network."""
    return hpo.TrainedModel.load(folder).networks[0]


if __name__ == "__main__":
    for answer in hpo.TrainedModel.load(Path(__file__).parent).predict(sys.argv[1:]):
        print(answer)
''')


def _network_code(
    config: ModelConfig, model: nn.Module, *, classes: int, image_size: int
) -> tuple[str, str]:
    """Return the statements that build the network `model`, which `models.build` made of `config`,
    and the source of the class that they need, if any. Raises _NotPlain."""
    if isinstance(model, models.SmallCnn):
        named = ",\n".join(f"{name}={_code(part)}" for name, part in model.named_children())
        body = f"return nn.Sequential(\n    OrderedDict(\n{indent(named, ' ' * 8)},\n    )\n)"
        return body, inspect.getsource(models.Block)
    if config.architecture not in TORCHVISION_ARCHITECTURES:
        raise _NotPlain(config.architecture)
    from torchvision.models import get_model

    with torch.device("meta"):  # shapes alone
        options = _options(config, classes, image_size)
        plain = get_model(config.architecture, weights=None, **options)
    lines = [f"model = {_builder_code(config, classes=classes, image_size=image_size)}"]
    for path, text in _changes(model, plain):
        lines.append(f'model.set_submodule("{path}", {text})')
    return "\n".join([*lines, "return model"]), ""


def _builder_code(config: ModelConfig, *, classes: int, image_size: int) -> str:
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
    place in `plain`, at `path` of the variable `model`. Raises _NotPlain if it is not there."""
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
    raise _NotPlain(type(module).__name__)
