"""Image retrieval: neighbours against brute force, the index, its metrics, and training with it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import precision_recall_fscore_support
from sklearn.metrics.pairwise import cosine_distances
from sklearn.preprocessing import StandardScaler

from hpo.config.retrieval import RETRIEVED, RetrievalConfig
from hpo.config.study import parse_study
from hpo.config.train import TrainConfig
from hpo.control import NullControl
from hpo.errors import ConfigError, DataError, TrialFailed
from hpo.training import learner, models, retrieval
from hpo.training.evaluation import Embedded, classifier, embed, width
from hpo.training.retrieval import Found, Index
from hpo.training.train import EpochResult, train
from tests.harness.training import DATA, Pictures, config

CPU = torch.device("cpu")
WAYS: list[dict[str, Any]] = [
    {"distance": distance, "standardize": standardize, "pca": pca}
    for distance in ("euclidean", "cosine")
    for standardize in (False, True)
    for pca in (None, 4)
]


def shelf(count: int, seed: int, *, width: int = 6, classes: int = 3, named: str = "") -> Embedded:
    """Vectors around a centre for each class."""
    source = np.random.default_rng(seed)
    labels = source.integers(0, classes, count)
    features = labels[:, None] + source.normal(0, 1, (count, width)) * np.arange(1, width + 1)
    names = tuple(f"{named}{seed}/{i}" for i in range(count))
    return Embedded(features.astype(np.float32), labels, names, names)


def brute(index: Index, queries: Embedded, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Neighbours and distances by looking at every pair, one after another."""
    gallery, others = index.place(index.gallery.features), index.place(queries.features)
    cosine = index.config.distance == "cosine"
    if cosine:
        gallery, others = retrieval.unit(gallery), retrieval.unit(others)
    places, distances = [], []
    for query, identity in zip(others, queries.identities, strict=True):
        pairs = []
        for place, one in enumerate(gallery):
            if index.gallery.identities[place] != identity:
                near = (
                    max(0.0, 1.0 - (one * query).sum()) if cosine else np.square(one - query).sum()
                )
                pairs.append((near, place))
        best = sorted(pairs)[:k]
        places.append([place for _, place in best])
        distances.append([float(near if cosine else np.sqrt(near)) for near, _ in best])
    return places, distances


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("count", [40, 7, 4])
def test_neighbours_are_those_of_brute_force_to_the_last_digit(
    way: dict[str, Any], count: int
) -> None:
    index = Index.fit(shelf(count, 0), RetrievalConfig(k=7, **way))
    queries = shelf(9, 1)
    found = index.search(queries, classes=3)
    places, distances = brute(index, queries, 7)
    assert found.indices.tolist() == places
    assert found.distances.tolist() == distances
    assert found.indices.shape == (9, min(7, count))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_brute_force_where_quick_distances_cannot_tell(distance: Any) -> None:
    source = np.random.default_rng(0)
    base = source.normal(0, 1, 5) + 1e4
    near = base + source.integers(0, 2, (60, 5)) * 1e-3  # many equal, the others hardly apart
    names = tuple(map(str, range(60)))
    gallery = Embedded(near.astype(np.float32), np.zeros(60, np.int64), names, names)
    index = Index.fit(gallery, RetrievalConfig(k=6, distance=distance))
    queries = dataclasses.replace(shelf(5, 3), features=gallery.features[::12].copy())
    found = index.search(queries, classes=3)
    assert (found.indices.tolist(), found.distances.tolist()) == brute(index, queries, 6)


def test_a_collapsed_network_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, queries = shelf(100, 0), shelf(50, 1)
    gallery.features[:], queries.features[:] = 1, 2
    original, whole = retrieval._Rows.ranked, []

    def counted(self: Any, rows: Any, *others: Any) -> Any:
        whole.append(len(rows) == 100)
        return original(self, rows, *others)

    monkeypatch.setattr(retrieval._Rows, "ranked", counted)
    found = Index.fit(gallery, RetrievalConfig()).search(queries, classes=3)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 50
    assert whole.count(True) == 1


def test_cosine_is_scikit_learns_also_for_zeros() -> None:
    gallery, queries = shelf(20, 0), shelf(5, 1)
    gallery.features[3] = 0
    queries.features[2] = 0
    index = Index.fit(gallery, RetrievalConfig(k=20, distance="cosine"))
    found = index.search(queries, classes=3)
    every = cosine_distances(queries.features.astype(float), gallery.features.astype(float))
    expected = np.take_along_axis(every, found.indices, 1)
    np.testing.assert_allclose(found.distances, expected, atol=1e-12)
    assert found.distances[2].tolist() == [1.0] * 20


def test_scaling_and_components_are_scikit_learns_fitted_on_the_gallery() -> None:
    gallery, queries = shelf(40, 0), shelf(9, 1)
    index = Index.fit(gallery, RetrievalConfig(standardize=True, pca=3))
    scaler = StandardScaler().fit(gallery.features.astype(float))
    pca = PCA(3, svd_solver="covariance_eigh").fit(scaler.transform(gallery.features.astype(float)))
    expected = pca.transform(scaler.transform(queries.features.astype(float)))
    np.testing.assert_allclose(index.place(queries.features), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [4, 40])
def test_too_many_components_are_an_error(count: int) -> None:
    most = min(count, 6)
    Index.fit(shelf(count, 0), RetrievalConfig(pca=most))
    with pytest.raises(ConfigError, match=rf"retrieval.pca: {most + 1}: .*0 to {most}"):
        Index.fit(shelf(count, 0), RetrievalConfig(pca=most + 1))
    Index.fit(shelf(count, 0), RetrievalConfig(pca=0))


def test_no_image_is_its_own_neighbour() -> None:
    gallery = shelf(10, 0)
    twins = dataclasses.replace(gallery, identities=("same", "same", *gallery.identities[2:]))
    found = Index.fit(twins, RetrievalConfig(k=10)).search(twins, classes=3)
    for place, row in enumerate(found.indices.tolist()):
        own = {0, 1} if place < 2 else {place}
        left = [one for one in row if one >= 0]
        assert set(left) == set(range(10)) - own
        assert row == left + [-1] * (10 - len(left))
    assert np.isfinite(found.mean_distances).all()


def test_an_image_alone_in_the_gallery_finds_nothing() -> None:
    alone = shelf(1, 0)
    with pytest.raises(DataError, match="no other image"):
        Index.fit(alone, RetrievalConfig()).search(alone, classes=3)


def test_features_that_are_not_finite_are_refused() -> None:
    gallery = shelf(10, 0)
    gallery.features[2, 1] = np.nan
    with pytest.raises(TrialFailed, match="not finite"):
        Index.fit(gallery, RetrievalConfig())


def found_of(near: list[list[int]], labels: list[int], k: int) -> Found:
    rows = np.array(near)
    distances = np.where(rows < 0, np.inf, np.arange(1.0, rows.shape[1] + 1))
    return Found(rows, distances, rows, np.array(labels), k, 3)


def test_precision_votes_and_distances_by_hand() -> None:
    found = found_of(
        [[0, 1, 1, 0, 2, 0], [2, 2, 1, 1, 1, 1], [1, 0, -1, -1, -1, -1]], [0, 2, 1], k=4
    )
    assert found.precision(5).tolist() == [2 / 5, 2 / 5, 1 / 2]
    assert found.precision(4).tolist() == [2 / 4, 2 / 4, 1 / 2]
    assert found.votes.tolist() == [0, 2, 1], "ties go to the class of the nearest"
    assert found.mean_distances.tolist() == [2.5, 2.5, 1.5]
    assert found_of([[0, 1, 1, 2, 2]], [1], k=5).votes.tolist() == [1]


def test_metrics_of_the_vote_are_scikit_learns() -> None:
    queries = shelf(50, 1)
    found = Index.fit(shelf(40, 0), RetrievalConfig(k=10)).search(queries, classes=3)
    metrics = found.metrics()
    assert tuple(metrics) == RETRIEVED
    expected = precision_recall_fscore_support(
        queries.labels, found.votes, labels=range(3), average="macro", zero_division=0
    )
    told = [metrics[f"val_{name}"] for name in ("precision", "recall", "f1")]
    np.testing.assert_allclose(told, expected[:3], rtol=1e-12)
    assert metrics["val_top1"] == (found.votes == queries.labels).mean()
    right = found.neighbours == queries.labels[:, None]
    assert metrics["val_precision_at_5"] == pytest.approx(right[:, :5].mean(), rel=1e-12)
    assert metrics["val_precision_at_k"] == pytest.approx(right[:, :10].mean(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_at_5_is_told_for_a_smaller_k(k: int) -> None:
    found = Index.fit(shelf(40, 0), RetrievalConfig(k=k)).search(shelf(9, 1), classes=3)
    assert found.indices.shape == (9, 5)
    assert found.mean_distances.tolist() == found.distances[:, :k].mean(1).tolist()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_index_comes_back_from_its_file(way: dict[str, Any], tmp_path: Path) -> None:
    index = Index.fit(shelf(40, 0), RetrievalConfig(**way))
    index.save(tmp_path / "index.npz")
    again = Index.load(tmp_path / "index.npz")
    assert again.config == index.config
    assert again.gallery.names == index.gallery.names
    queries = shelf(9, 1)
    before, after = index.search(queries, classes=3), again.search(queries, classes=3)
    assert after.distances.tolist() == before.distances.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"PK\x03\x04 cut off"])
def test_what_is_no_index_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        Index.load(path)


# ---- features ----

CUT = {
    "small_cnn": 128,
    "alexnet": 9216,
    "convnext_tiny": 768,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "maxvit_t": 512,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "swin_t": 768,
    "vgg11": 25088,
    "vit_b_16": 768,
}


def cut_width(architecture: str, **model: Any) -> int:
    settings = TrainConfig.parse({"model": {"architecture": architecture, **model}})
    return width(models.build(settings.model, classes=3, image_size=224), 224)


@pytest.mark.parametrize("architecture", CUT)
def test_every_family_is_cut_before_its_classifier(architecture: str) -> None:
    assert cut_width(architecture) == CUT[architecture]


@pytest.mark.parametrize("architecture", ["small_cnn", "mobilenet_v2", "squeezenet1_1"])
def test_a_head_of_ones_own_changes_no_feature(architecture: str) -> None:
    assert cut_width(architecture, head={"hidden": [16, 8]}) == CUT[architecture]


def test_features_are_what_the_classifier_gets() -> None:
    network = learner.Learner(config(), classes=3, device=CPU).model
    batch = torch.rand(5, 3, 8, 8)
    images = Pictures(5, 0)
    told, _ = embed(network, images, [(batch, torch.from_numpy(images.labels))], classes=3,
                    device=CPU, precision="float32", control=NullControl())  # fmt: skip
    with torch.no_grad():
        expected = network.eval().features(batch).mean((2, 3))  # type: ignore[operator]
    np.testing.assert_allclose(told.features, expected.numpy(), rtol=1e-5)
    layer = classifier(network)
    assert not layer._forward_pre_hooks


def test_equal_pixels_are_one_picture() -> None:
    first, again, other = Pictures(4, 0), Pictures(4, 0), Pictures(4, 1)
    assert first.identities == again.identities
    assert not set(first.identities) & set(other.identities)


# ---- training ----


def run(settings: TrainConfig, **options: Any) -> list[EpochResult]:
    return list(train(settings, DATA, NullControl(), device=CPU, **options))


def test_a_frozen_network_is_one_epoch_and_does_not_learn() -> None:
    settings = config(task="retrieval", model={"cnn": {"filters": [4, 8]}, "trainable_blocks": 0})
    assert settings.epochs == 1
    (only,) = run(settings, metric="val_precision_at_k")
    assert only.last
    assert only.best_epoch == 1
    assert set(only.metrics) == {*RETRIEVED, "seconds", "images_per_s", "peak_memory_mb"}
    assert 0.5 < only.metrics["val_precision_at_5"] <= 1, "brightness tells the classes apart"


def test_a_network_that_learns_is_measured_after_each_epoch(tmp_path: Path) -> None:
    settings = config(task="retrieval", epochs=2, retrieval={"k": 10, "standardize": True})
    first, second = run(settings, metric="val_mean_distance")
    expected = {*RETRIEVED, "val_loss", "train_loss", "train_top1", "lr"}
    for one in (first, second):
        assert set(one.metrics) == {*expected, "seconds", "images_per_s", "peak_memory_mb"}
    values = [one.metrics["val_mean_distance"] for one in (first, second)]
    assert second.best_epoch == values.index(min(values)) + 1
    assert values[0] != values[1]


def test_phases_that_open_blocks_are_trained() -> None:
    phases = [{"epochs": 1}, {"epochs": 1, "trainable_blocks": 1}]
    model = {"cnn": {"filters": [4, 8]}, "trainable_blocks": 0}
    settings = config(task="retrieval", model=model, phases=phases)
    assert not settings.frozen
    first, second = run(settings, metric="val_top1")
    assert first.metrics["val_mean_distance"] != second.metrics["val_mean_distance"]


def test_the_average_of_the_weights_is_measured_where_there_is_one() -> None:
    plain = run(config(task="retrieval", epochs=1), metric="val_top1")[-1].metrics
    settings = config(task="retrieval", epochs=1, ema_decay=0.99)
    averaged = run(settings, metric="val_top1")[-1].metrics
    assert averaged["train_loss"] == plain["train_loss"]
    assert averaged["val_mean_distance"] != plain["val_mean_distance"]


def test_training_is_that_of_the_classifier() -> None:
    plain = run(config(epochs=2))[-1].metrics
    found = run(config(task="retrieval", epochs=2), metric="val_top1")[-1].metrics
    assert found["train_loss"] == plain["train_loss"]
    assert found["val_loss"] == plain["val_loss"]


def test_a_loss_that_is_not_finite_ends_a_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(task="retrieval", epochs=3, optimizer={"lr": 100.0, "weight_decay": 10.0})
    original = learner.Learner.step

    def broken(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        for part in self.model.parameters():
            part.data.fill_(math.nan)

    monkeypatch.setattr(learner.Learner, "step", broken)
    (only,) = run(settings, metric="val_precision_at_5")
    assert only.diverged
    assert math.isnan(only.metrics["val_precision_at_5"])


def test_components_beyond_the_features_fail_the_training() -> None:
    settings = config(task="retrieval", model={"cnn": {"filters": [4, 8]}, "trainable_blocks": 0},
                      retrieval={"pca": 9})  # fmt: skip
    with pytest.raises(ConfigError, match=r"retrieval.pca: 9: .*70 training images of 8 features"):
        run(settings)


# ---- what may be asked for ----

STUDY = """[study]
metric = "{metric}"
[train]
task = "{task}"
[train.model]
trainable_blocks = {blocks}
[space]
retrieval.k = {{low = 1, high = 20}}
retrieval.pca = [0, 16]
retrieval.distance = ["euclidean", "cosine"]
retrieval.standardize = [true, false]
data.image_size = [8, 16]
"""


def study(metric: str, task: str, blocks: str) -> Any:
    text = STUDY.format(metric=metric, task=task, blocks=blocks)
    return parse_study(text, defaults={"name": "s"})


@pytest.mark.parametrize("metric", RETRIEVED)
def test_a_retrieval_can_be_searched(metric: str) -> None:
    file = study(metric, "retrieval", "0")
    assert file.max_epochs == 1
    assert file.direction == ("minimize" if metric == "val_mean_distance" else "maximize")


@pytest.mark.parametrize(
    ("metric", "task", "blocks"),
    [
        ("val_precision_at_5", "classification", '"all"'),
        ("val_mean_distance", "classification", "0"),
        ("val_top5", "retrieval", '"all"'),
        ("val_loss", "retrieval", "0"),
        ("train_loss", "retrieval", "0"),
    ],
)
def test_a_metric_that_the_task_does_not_give_is_an_error(
    metric: str, task: str, blocks: str
) -> None:
    with pytest.raises(ConfigError, match=rf"study.metric: '{metric}': task = '{task}'.* allowed"):
        study(metric, task, blocks)


def test_the_default_metric_of_a_retrieval() -> None:
    text = STUDY.format(metric="", task="retrieval", blocks="0").replace('metric = ""', "")
    assert parse_study(text, defaults={"name": "s"}).metric == "val_precision_at_k"


def test_the_task_is_not_searched() -> None:
    with pytest.raises(ConfigError, match=r"space\.task: cannot be searched"):
        parse_study('[study]\nname = "s"\n[space]\ntask = ["classification", "retrieval"]\n')


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retrieval": {"k": 0}}, "retrieval.k: 0: "),
        ({"retrieval": {"k": 1001}}, "retrieval.k: 1001: "),
        ({"retrieval": {"pca": -1}}, "retrieval.pca: -1: "),
        ({"retrieval": {"distance": "manhattan"}}, 'retrieval.distance: "manhattan": '),
        ({"task": "segmentation"}, 'task: "segmentation": '),
        (
            {"task": "retrieval", "early_stopping": {"patience": 2, "metric": "val_top5"}},
            "early_stopping.metric: \"val_top5\": task = 'retrieval' does not give it",
        ),
        (
            {"schedule": {"name": "plateau", "metric": "val_f1"}},
            "schedule.metric: \"val_f1\": task = 'classification' does not give it",
        ),
    ],
)
def test_mistakes_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse(fields)
    assert str(error.value).startswith(message)
