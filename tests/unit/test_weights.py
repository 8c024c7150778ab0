"""Files of pretrained weights: known without torch, fetched once, and never replaced silently."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torchvision.models import get_model_weights

from hpo.config.model import TORCHVISION_ARCHITECTURES
from hpo.config.train import TrainConfig
from hpo.errors import DataError
from hpo.training.weights import WeightsFile, fetch, hub_folder, needed_weights, weights_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


class Served(http.server.SimpleHTTPRequestHandler):
    """A folder; what was asked for, in order."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(f"{self.command} {self.path}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (Served,), {"asked": []})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    ) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", folder, handler.asked
        found.shutdown()


def test_all_that_torchvision_has_is_known_and_where_it_caches() -> None:
    assert str(hub_folder()) == f"{torch.hub.get_dir()}/checkpoints"
    for architecture in TORCHVISION_ARCHITECTURES[::8]:
        theirs = get_model_weights(architecture)
        assert {
            name: (one.url, one.megabytes) for name, one in weights_of(architecture).items()
        } == {
            name: (theirs[name].url, theirs[name].meta["_file_size"]) for name in theirs.__members__
        }


def test_several_processes_download_once(server: tuple[str, Path, list[str]], cache: Path) -> None:
    url, folder, asked = server
    name = f"net-{hashlib.sha256(b'tensors').hexdigest()[:8]}.pth"
    (folder / name).write_bytes(b"tensors")
    file = WeightsFile("net", "DEFAULT", f"{url}/{name}", 14.2)
    assert file.look() == "weights DEFAULT of net: 14 MB to download"
    assert not cache.exists()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch([file]), range(4)))
    assert (cache / name).read_bytes() == b"tensors"
    assert asked.count(f"GET /{name}") == 1
    assert file.look() == "weights DEFAULT of net: cached"


@pytest.mark.parametrize("name", ["net-00000000.pth", "none-00000000.pth"])
def test_what_is_not_the_file_is_refused_with_the_remedy(
    server: tuple[str, Path, list[str]], cache: Path, name: str
) -> None:
    url, folder, _ = server
    (folder / "net-00000000.pth").write_bytes(b"a login page")
    file = WeightsFile("net", "DEFAULT", f"{url}/{name}", 14.2)
    remedy = f"Put {url}/{name} into {cache}, or go on without .*--from-scratch"
    with pytest.raises(DataError, match=rf"unreachable \(.*\)\. {remedy}"):
        fetch([file])
    assert not file.is_cached


def test_which_weights_are_needed() -> None:
    pretrained = {"model": {"architecture": "resnet18", "weights": "DEFAULT"}}
    [file] = needed_weights(map(TrainConfig.parse, [pretrained, {}, pretrained]))
    assert (file.architecture, file.name) == ("resnet18", "DEFAULT")
    own = TrainConfig.parse({"model": {"weights": "gone/w.pth"}})
    with pytest.raises(DataError, match=r"gone/w\.pth: no such file"):
        needed_weights([own])
