"""Trained weights for plain torch: what stands in their header, and the load.py beside them.

load.py builds the network from torchvision and `torch.nn` alone, so it works where hpo is not
installed. A network that these cannot spell (a function of the user's) is loaded by hpo instead,
and load.py says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from pprint import pformat
from string import Template
from textwrap import indent
from typing import TYPE_CHECKING

import hpo
from hpo.config.data import DataConfig
from hpo.config.model import TORCHVISION_ARCHITECTURES
from hpo.config.train import TrainConfig
from hpo.io import write_text
from hpo.trained.run import RunMetadata, SeedDir, TrainedRun
from hpo.training.spelling import NotPlain, builder_code, network_code
from hpo.training.tasks import task_of

if TYPE_CHECKING:
    from torch import nn

WIDTH = 100
"""Columns of the code in load.py."""


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
        network, helper = network_code(config.model, model, classes=count, image_size=size)
    except NotPlain as error:
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
            f"model = {builder_code(model, classes=count, image_size=size)}",
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
