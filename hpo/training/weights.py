"""Files of torchvision's and timm's pretrained weights: where they are cached, and how they come
there.

It imports no torch, so that `hpo run` can look before its workers start: names, addresses and sizes
are read from torchvision's and timm's sources. The caches are torch.hub's and the Hugging Face
Hub's, which other programs share.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock

from hpo.config.base import is_timm
from hpo.config.model import TORCHVISION_ARCHITECTURES
from hpo.config.study import StudyFile
from hpo.config.train import TrainConfig
from hpo.control import enter_phase
from hpo.errors import ConfigError, DataError
from hpo.io import CountingFile, atomic_write
from hpo.training.timm_names import hub_repositories, split

if TYPE_CHECKING:
    from http.client import HTTPResponse

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
"""Extensions of files of weights."""
PATIENCE_S = 20.0
"""Seconds without an answer after which a server counts as unreachable."""
LOOK_S = 5.0
"""The same where it is only asked whether it is there."""
CHUNK = 1 << 18
UNREACHABLE = (OSError, http.client.HTTPException)
"""What a download raises that does not come."""


@dataclass(frozen=True)
class WeightsFile:
    """Pretrained weights of a torchvision architecture."""

    architecture: str
    name: str
    """Their name in torchvision, such as DEFAULT."""
    url: str
    megabytes: float

    @property
    def path(self) -> Path:
        """Return the file in torch.hub's cache."""
        return hub_folder() / self.url.rpartition("/")[2]

    @property
    def is_cached(self) -> bool:
        """Return whether nothing need be downloaded."""
        return self.path.exists()

    @property
    def title(self) -> str:
        """Return what they are, in words."""
        return f"weights {self.name} of {self.architecture}"

    @property
    def size(self) -> str:
        """Return how much is to be downloaded, in words."""
        return f"{self.megabytes:.0f} MB"

    def look(self) -> str:
        """Return in words whether they are cached or can be downloaded; nothing is written."""
        if self.is_cached:
            return f"{self.title}: cached"
        try:
            with _open(self.url, LOOK_S, method="HEAD"):
                return f"{self.title}: {self.size} to download"
        except UNREACHABLE as error:
            return f"{self.title}: unreachable ({_reason(error)})"

    def fetch(self) -> None:
        """Download the file unless it is cached; of several processes one does. Raises OSError or
        HTTPException where it cannot come, DiskFull."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if not self.is_cached:
                with _open(self.url, PATIENCE_S) as answer:
                    atomic_write(self.path, lambda file: self._receive(answer, file))

    def _receive(self, answer: HTTPResponse, file: CountingFile) -> None:
        """Write what a server sends; raise OSError unless it is what the file's name promises."""
        done, digest = 0, hashlib.sha256()
        while chunk := answer.read(CHUNK):
            file.write(memoryview(chunk))
            digest.update(chunk)
            done += len(chunk)
            enter_phase(f"downloading {self.path.name}: {done / 1e6:.0f} of {self.size}")
        promised = re.search(r"-([0-9a-f]{8,})\.", self.path.name)
        if promised and not digest.hexdigest().startswith(promised[1]):
            raise OSError(f"{done:,} bytes came that are not this file")


@dataclass(frozen=True)
class HubFile(WeightsFile):
    """Pretrained weights of timm's in the cache of the Hugging Face Hub, which others share."""

    repository: str
    file: str

    @classmethod
    def of(cls, architecture: str, name: str, repository: str, file: str) -> HubFile:
        """Return the file of a repository."""
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return cls(architecture, name, f"{hub}/{repository}/resolve/main/{file}", 0, repository,
                   file)  # fmt: skip

    @property
    def path(self) -> Path:
        """Return the file in the cache, where it is."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.file)
        return Path(found) if isinstance(found, str) else Path(self.file)

    @property
    def is_cached(self) -> bool:
        """Return whether nothing need be downloaded."""
        return self.path.is_absolute()

    @property
    def size(self) -> str:
        """Return what is to be downloaded, in words."""
        return self.url

    def look(self) -> str:
        """Return in words whether they are cached or can be downloaded; nothing is written."""
        if self.is_cached:
            return f"{self.title}: cached"
        try:
            with _open(self.url, LOOK_S, method="HEAD") as answer:
                size = int(answer.headers.get("Content-Length") or 0) / 1e6
                return f"{self.title}: {size:.0f} MB to download"
        except UNREACHABLE as error:
            return f"{self.title}: unreachable ({_reason(error)})"

    def fetch(self) -> None:
        """Download the file unless it is cached. Raises OSError where it cannot come."""
        from huggingface_hub import hf_hub_download

        enter_phase(f"downloading {self.repository}")
        try:
            with _open(self.url, LOOK_S, method="HEAD"):  # the hub's client tries for minutes
                hf_hub_download(self.repository, self.file)
        except UNREACHABLE:
            raise
        except Exception as error:  # its client has many
            raise OSError(str(error).strip().splitlines()[0]) from error


def fetch(files: Iterable[WeightsFile], say: Callable[[str], object] = lambda line: None) -> None:
    """Download the files that are not cached; `say` is told. Raises DataError, saying what to do,
    where some cannot come, DiskFull."""
    away: dict[WeightsFile, Exception] = {}
    for file in files:
        if file.is_cached:
            continue
        into = "" if isinstance(file, HubFile) else f" into {hub_folder()}"
        say(f"{file.title}: downloading {file.size}{into}")
        try:
            file.fetch()
        except UNREACHABLE as error:
            away[file] = error
    if away:
        named = "; ".join(f"{file.title}: unreachable ({_reason(away[file])})" for file in away)
        raise DataError(f"{named}. {remedy(away)}")


def look(files: Iterable[WeightsFile]) -> list[str]:
    """Return a line for each file: cached, to be downloaded, or unreachable; and what to do then.
    Nothing is written."""
    told = {file: file.look() for file in files}
    away = [file for file, line in told.items() if "unreachable" in line]
    return [*told.values(), *([remedy(away)] if away else [])]


def remedy(files: Iterable[WeightsFile]) -> str:
    """Return what to do where `files` cannot be downloaded."""
    known = list(files)
    torch_hub = " and ".join(file.url for file in known if not isinstance(file, HubFile))
    other = " and ".join(file.url for file in known if isinstance(file, HubFile))
    ways = [f"put {torch_hub} into {hub_folder()}"] if torch_hub else []
    ways += [f"get {other} elsewhere and name the file as model.weights"] if other else []
    said = ", ".join([*ways, "or go on without pretrained weights"])
    return f"{said[:1].upper()}{said[1:]}: --from-scratch of hpo init and hpo run FOLDER"


def _reason(error: Exception) -> object:
    return getattr(error, "reason", None) or error


def _open(url: str, patience_s: float, method: str = "GET") -> HTTPResponse:
    request = Request(url, headers={"User-Agent": "hpo"}, method=method)
    try:
        return urlopen(request, timeout=patience_s)  # type: ignore[no-any-return]
    except HTTPError as error:
        with error:  # it holds the connection
            raise OSError(f"{error.code} {error.reason}") from None


def hub_folder() -> Path:
    """Return the folder where torch.hub keeps files of weights."""
    usual = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{usual}/torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def is_file(weights: str) -> bool:
    """Return whether `model.weights` names a file, not weights of torchvision."""
    return Path(weights).suffix in SUFFIXES or "/" in weights


def find_weights(name: str, architecture: str) -> WeightsFile:
    """Return torchvision's or timm's weights of this name; raise ConfigError where there are
    none."""
    if is_timm(architecture):
        return _of_timm(name, architecture)
    if architecture not in TORCHVISION_ARCHITECTURES:
        message = f"{name!r}: {architecture} has none by name; give a file"
        raise ConfigError(message, key="model.weights")
    known = weights_of(architecture)
    if name not in known:
        raise ConfigError(
            f"{name!r}: {architecture} has {', '.join(known)}; or give a file "
            f"({', '.join(SUFFIXES)})",
            key="model.weights",
        )
    return known[name]


def _of_timm(name: str, architecture: str) -> HubFile:
    known = hub_repositories(architecture)
    _, tag = split(architecture)
    wanted = tag if name == "DEFAULT" and tag else name
    if name == "DEFAULT" and not tag and known:
        wanted = next(iter(known))
    if wanted not in known:
        have = (
            f"{', '.join(['DEFAULT', *known])}; or" if known else "none on the hub that it names;"
        )
        raise ConfigError(
            f"{wanted!r}: {architecture} has {have} give a file ({', '.join(SUFFIXES)})",
            key="model.weights",
        )
    return HubFile.of(architecture, wanted, *known[wanted])


def needed_weights(configs: Iterable[TrainConfig]) -> list[WeightsFile]:
    """Return torchvision's weights that `configs` start from, each once. Raises ConfigError for an
    unknown name, DataError for a file of the user's that is not there."""
    found: dict[WeightsFile, None] = {}
    for model in (config.model for config in configs):
        if model.weights is None:
            continue
        if not is_file(model.weights):
            found[find_weights(model.weights, model.architecture)] = None
        elif not Path(model.weights).is_file():
            raise missing(Path(model.weights))
    return list(found)


def weights_of_study(file: StudyFile) -> list[WeightsFile]:
    """Return torchvision's weights that trials of a study may start from. Raises as
    `needed_weights`."""
    searched = ("model.architecture", "model.weights")
    ends = {name: file.space[name].bounds() for name in searched if name in file.space}
    configs = []
    for values in itertools.product(*ends.values()):
        with suppress(ConfigError):  # values that do not go together
            pinned = dict(zip(ends, values, strict=True))
            configs.append(file.config(file.space.around(pinned)))
    return needed_weights(configs)


def missing(path: Path) -> DataError:
    """Return the error for a file of weights that is not there."""
    return DataError(f"model.weights: {path}: no such file; give a .safetensors or .pth file")


@cache
def weights_of(architecture: str) -> Mapping[str, WeightsFile]:
    """Return all weights of one of torchvision's architectures by name, without importing it."""
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        if f"\ndef {architecture}(" in text:
            return _read_weights(ast.parse(text), architecture)
    return {}


def _sources() -> list[Path]:
    spec = find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    return [path for one in folders or () for path in sorted(Path(one, "models").glob("*.py"))]


def _read_weights(tree: ast.Module, architecture: str) -> dict[str, WeightsFile]:
    """Return the members of the enumeration that annotates the builder's argument `weights`."""
    builder = next(
        one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == architecture
    )
    taken = [*builder.args.args, *builder.args.kwonlyargs]
    named = next(ast.unparse(one.annotation) for one in taken
                 if one.arg == "weights" and one.annotation)  # fmt: skip
    members = next(
        one.body for one in tree.body
        if isinstance(one, ast.ClassDef) and re.search(rf"\b{one.name}\b", named)
    )  # fmt: skip
    found: dict[str, WeightsFile] = {}
    for member in members:
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
            name = member.targets[0].id
            if isinstance(member.value, ast.Name):  # another name of one above
                same = found[member.value.id]
                found[name] = WeightsFile(architecture, name, same.url, same.megabytes)
            elif isinstance(member.value, ast.Call):
                url, size = _constant(member.value, "url"), _constant(member.value, "_file_size")
                found[name] = WeightsFile(architecture, name, str(url), float(str(size)))
    return found


def _constant(call: ast.Call, name: str) -> object:
    """Return the constant that is given to `call` as argument `name`, or under that key in a dict
    among its arguments."""
    for node in ast.walk(call):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    return ast.literal_eval(value)
    raise KeyError(name)
