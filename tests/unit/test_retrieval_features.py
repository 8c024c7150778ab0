"""A retrieval on kept features: the same results, and no picture and no frozen layer seen twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hpo.config.retrieval import RETRIEVED
from hpo.data import cache as caching
from hpo.data import images
from hpo.data.images import MemmapImages
from hpo.paths import Home
from hpo.trained.retrain import retrain
from hpo.trained.run import TrainedRun
from hpo.training import feature_cache
from hpo.training.retrieval import Index
from hpo.training.tracing import MORE
from tests.harness.images import make_folder
from tests.unit.test_features import LAYOUTS, Counted, config, files, run

FROZEN = {"cnn": {"filters": [8, 16]}, "trainable_blocks": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pictures", {"train": 27, "val": 7, "test": 3}, size=(20, 16))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def found(folder: Path, cache: Path, *, kept: bool = True, **fields: Any) -> list[dict[str, float]]:
    """What each epoch of a retrieval says of it."""
    settings = config(folder, **{"task": "retrieval", "model": FROZEN} | fields)
    results = run(settings, cache, kept=kept, metric="val_precision_at_5")
    return [{name: one.metrics[name] for name in RETRIEVED} for one in results]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "architecture", ["small_cnn", "mobilenet_v2", "squeezenet1_1", "mobilenet_v3_small"]
)
def test_the_results_are_those_without_bit_for_bit(
    folder: Path, tmp_path: Path, architecture: str, precision: str, layout: str
) -> None:
    """SqueezeNet has a map before its classifier, MobileNetV3 a layer of its head to be run."""
    fields: dict[str, Any] = {
        "batch_size": feature_cache.BATCH,
        "data": {"image_size": 32},
        "model": {"architecture": architecture, "trainable_blocks": 0},
        "runtime": {"precision": precision, "memory_format": layout, "threads": 1},
    }
    plain = found(folder, tmp_path, kept=False, **fields)
    assert not files(tmp_path)
    for _ in range(2):
        assert found(folder, tmp_path, **fields) == plain
        assert len(files(tmp_path)) == 2


def test_batches_of_another_size_round_differently_at_most(folder: Path, tmp_path: Path) -> None:
    (plain,) = found(folder, tmp_path, kept=False, batch_size=7)
    assert found(folder, tmp_path, batch_size=7) == [pytest.approx(plain, rel=1e-5)]


@pytest.mark.parametrize("augment", [{"horizontal_flip": 0.5}, {"rotation": 9.0, "mixup": 0.2}])
def test_where_nothing_learns_augmentation_is_of_no_matter(
    folder: Path, tmp_path: Path, counted: Counted, augment: dict[str, Any]
) -> None:
    assert found(folder, tmp_path) == found(folder, tmp_path, augment=augment)
    assert counted.parts == 2


class Seen:
    """Pictures that were decoded or read, and convolutions that were run on more than shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = self.convolutions = 0
        monkeypatch.setattr(images, "decode", self._watched(images.decode))
        for module in (images, caching):
            monkeypatch.setattr(module, "decode_with_form", self._watched(images.decode_with_form))
        for name in ("pixels", "stacked"):
            monkeypatch.setattr(MemmapImages, name, self._watched(getattr(MemmapImages, name)))

    def _watched(self, original: Any) -> Any:
        def watched(*args: Any) -> Any:
            self.pictures += 1
            return original(*args)

        return watched

    def hear(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(layer, nn.Conv2d) and not inputs[0].is_meta:
            self.convolutions += len(inputs[0]) > MORE  # than it takes to find the cut


@pytest.mark.parametrize("data", [{}, {"cache_limit_gb": 2e-5, "loader_workers": 0}])
def test_another_trial_decodes_nothing_and_runs_no_frozen_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    """Also where there is no room for the pictures themselves."""
    seen = Seen(monkeypatch)
    hook = nn.modules.module.register_module_forward_pre_hook(seen.hear)
    try:
        first = found(folder, tmp_path, data=data)
        assert seen.pictures
        assert seen.convolutions
        seen.pictures = seen.convolutions = 0
        others = [{"k": 9}, {"distance": "cosine"}, {"standardize": True}, {"pca": 3}]
        for retrieval in others:
            assert found(folder, tmp_path, data=data, retrieval=retrieval) != first
        assert (seen.pictures, seen.convolutions) == (0, 0)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "fields",
    [
        {"model": FROZEN | {"trainable_blocks": 1}},
        {"model": FROZEN | {"trainable_blocks": 1}, "ema_decay": 0.9},
        {"model": FROZEN, "phases": [{"epochs": 1}, {"epochs": 2, "trainable_blocks": 1}]},
        {
            "model": FROZEN | {"trainable_blocks": 1},
            "augment": {"cached_views": 2, "rotation": 30.0, "vertical_flip": 0.5},
        },
    ],
    ids=["blocks", "average", "phases", "views"],
)
def test_a_network_that_learns_in_part(
    folder: Path, tmp_path: Path, counted: Counted, fields: dict[str, Any]
) -> None:
    plain = found(folder, tmp_path, kept=False, **fields)
    assert counted.parts == 0
    ours = found(folder, tmp_path, **fields)
    # Of training and validation images, and of the training images' views; of two cuts.
    assert counted.parts == (3 if "augment" in fields else 4 if "phases" in fields else 2)
    for one, other in zip(ours, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def retrained(folder: Path, cache: Path, out: Path, home: Home) -> TrainedRun:
    settings = config(folder, task="retrieval", model=FROZEN)
    found(folder, cache)
    return retrain(settings, {}, out=out, home=home, device="cpu")


def test_retraining_takes_the_features_of_the_search(
    folder: Path, tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    with_kept = retrained(folder, home.cache, tmp_path / "one", home)
    assert counted.parts == 2
    monkeypatch.setattr(feature_cache, "find_cut", lambda *_: None)
    without = retrained(folder, home.cache, tmp_path / "two", home)
    one, other = (Index.load(run.seeds[0].files.index) for run in (with_kept, without))
    assert one.gallery.identities == other.gallery.identities
    np.testing.assert_allclose(one.gallery.features, other.gallery.features, rtol=1e-5)
    test = with_kept.seeds[0].metrics["test"]["precision_at_5"]
    assert test == without.seeds[0].metrics["test"]["precision_at_5"]


@pytest.mark.parametrize(("side", "most"), [(16, 64), (224, 64), (448, 16), (600, 8), (1024, 3)])
def test_of_large_pictures_fewer_are_computed_at_once(side: int, most: int) -> None:
    assert feature_cache.images_at_once(side) == most
