"""Steps that are compiled or recorded are the same steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.config.study import dump_config, load_config
from hpo.config.train import RuntimeConfig, TrainConfig
from hpo.errors import ConfigError, Damaged
from hpo.training import compiling, learner
from hpo.training.checkpoint import Checkpoint
from hpo.training.optim import load_optimizer, make_optimizer, set_lr
from tests.harness.training import CPU, DATA, assert_same_checkpoint, config, files, numbers, run


class Repeating:
    """A recorder that repeats work by doing it again, as a device would, on the inputs' memory."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.warmed, self.recorded, self.replayed = fault, 0, 0, 0

    def warm_up(self, work: Callable[[], compiling.Parts], *, last: bool) -> compiling.Parts:
        self.warmed += 1
        assert last is (self.warmed == compiling.WARM_UP)
        if last and isinstance(self.fault, compiling.CannotRecord):
            raise self.fault
        return work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self.fault:
            raise self.fault

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Repeating]:
    """Every network's steps are recorded; the recorders in order."""
    made: list[Repeating] = []
    fault: list[Exception] = []

    def start(self: learner.Learner) -> None:
        self._compiled = None
        made.append(Repeating(fault[0] if fault else None))
        self._step = compiling.RecordedStep(self._update, made[-1])

    monkeypatch.setattr(learner.Learner, "_start_steps", start)
    monkeypatch.setattr(Repeating, "faults", fault, raising=False)
    return made


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"augment": {"mixup": 0.4, "cutmix": 0.5}},
    "average": {"ema_decay": 0.9, "clip_grad_norm": 0.5},
    "adam": {"optimizer": {"name": "adam", "lr": 0.01, "backbone_lr_factor": 0.5}},
    "phases": {"phases": [{"epochs": 2, "trainable_blocks": 0}, {"epochs": 2}]},
    "parts": {"runtime": {"precision": "float32", "threads": 1, "micro_batch": 5}},
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_are_those_that_would_be_taken(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = config(**CASES[case])
    plain = run(settings, checkpoint=files(tmp_path / "plain"))
    made: list[Repeating] = request.getfixturevalue("recorders")
    recorded = run(settings, checkpoint=files(tmp_path / "recorded"))
    close = {"rel": 1e-6} if case == "mixed" else {"rel": 0}  # a weight in float32
    for ours, theirs in zip(numbers(recorded), numbers(plain), strict=True):
        assert ours == pytest.approx(theirs, **close, abs=0)
    if case != "mixed":
        for ours, theirs in zip(recorded, plain, strict=True):
            assert ours.checkpoint is not None
            assert theirs.checkpoint is not None
            assert_same_checkpoint(ours.checkpoint, theirs.checkpoint)
    # Four full batches an epoch, and a short one that is not recorded.
    used = [one for one in made if one.warmed]
    epochs = 4 // len(used)
    assert len(used) == (2 if case == "phases" else 1)
    assert all((one.warmed, one.recorded) == (compiling.WARM_UP, 1) for one in used)
    assert all(one.replayed == 4 * epochs - compiling.WARM_UP for one in used)


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("CUDA error: not permitted"),
        torch.OutOfMemoryError("no room"),
        compiling.CannotRecord("it waits for the device"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(
    fault: Exception, recorders: list[Repeating], caplog: pytest.LogCaptureFixture
) -> None:
    Repeating.faults.append(fault)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        results = run(config(epochs=3))
    assert len(results) == 3
    (used,) = (one for one in recorders if one.warmed)
    tried = not isinstance(fault, compiling.CannotRecord)
    assert (used.recorded, used.replayed) == (tried, 0)
    (said,) = (one.message for one in caplog.records if "recorded" in one.message)
    assert said.startswith("steps are not recorded as a CUDA graph: ")
    assert str(fault) in said


class FakeCuda:
    """torch.cuda's streams and graphs; a recording that fails leaves its stream as the current one,
    as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.mode = "default", 0
        self.waited: list[tuple[str, str]] = []
        fakes = {
            "Stream": lambda device: FakeStream(self, "own"),
            "current_stream": lambda device: FakeStream(self, self.current),
            "stream": self.stream,
            "CUDAGraph": object,
            "graph": self.graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, stream: FakeStream, **_: Any) -> Iterator[None]:
        self.current = stream.name
        yield
        raise RuntimeError("operation failed due to a previous error during capture")


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.waited.append((self.name, other.name))


def test_a_recording_that_fails_leaves_the_device_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = compiling.CudaRecorder(torch.device("cuda:1"))
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(lambda: None)
    assert cuda.current == "default"

    def waits() -> compiling.Parts:
        assert cuda.current == "own"
        if cuda.mode == "error":  # type: ignore[comparison-overlap]
            raise RuntimeError(compiling.WAITED)
        return []

    assert recorder.warm_up(waits, last=False) == []
    with pytest.raises(compiling.CannotRecord, match="waits for the device"):
        recorder.warm_up(waits, last=True)
    assert (cuda.current, cuda.mode) == ("default", 0)
    assert cuda.waited == 2 * [("own", "default"), ("default", "own")]


def test_a_recording_keeps_no_more_than_its_inputs() -> None:
    """The labels of a mixed batch, its weight included, are copied for each replay."""
    seen: list[tuple[int, list[int], float]] = []

    def step(images: torch.Tensor, labels: compiling.Labels) -> compiling.Parts:
        assert not isinstance(labels, torch.Tensor)
        seen.append((int(images[0]), labels.others.tolist(), float(labels.weight)))
        return []

    recorded = compiling.RecordedStep(step, Repeating())
    for number in range(6):
        images = torch.full((2,), number)
        mixed = compiling.ops.Mixed(images, images + 1, number / 8)
        recorded(images, mixed)
    assert seen == [(n, [n + 1, n + 1], n / 8) for n in range(6)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_network_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    runtime = {"precision": "float32", "memory_format": "contiguous", "threads": 1}
    model = {"cnn": {"filters": [4, 8]}}
    plain = run(config(model=model, runtime=runtime, epochs=3))
    settings = config(model=model, runtime=runtime | {"compile": "inductor"}, epochs=3)
    compiled = run(settings)
    assert [one.metrics["train_loss"] for one in compiled] == pytest.approx(
        [one.metrics["train_loss"] for one in plain], rel=1e-3
    )
    assert any((tmp_path / "runs" / "cache" / "compiled").iterdir())


def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(network: Any) -> Any:
        def fail(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("InductorError: no compiler\nin many lines")

        return fail

    plain = run(config(epochs=2))
    monkeypatch.setattr(compiling, "compiled", compiled)
    runtime = {"precision": "float32", "memory_format": "contiguous", "threads": 1}
    with caplog.at_level(logging.WARNING):
        results = run(config(epochs=2, runtime=runtime | {"compile": "inductor"}))
    assert numbers(results) == numbers(plain)
    said = [one.message for one in caplog.records]
    assert said == ["the network is not compiled: RuntimeError: InductorError: no compiler"]


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, False),
        ({"loss": "focal"}, False),
        ({"loss": "mine:loss"}, True),
        ({"model": {"architecture": "nets:build"}}, True),
        ({"model": {"architecture": "timm:resnet18"}}, False),
    ],
)
def test_code_of_ones_own_is_not_recorded_unasked(fields: dict[str, Any], own: bool) -> None:
    assert compiling.is_own(TrainConfig.parse(fields)) is own


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_checkpoint_goes_from_one_kind_of_optimizer_to_the_other(name: str) -> None:
    settings = config(optimizer={"name": name, "lr": 0.01}).optimizer
    network = torch.nn.Linear(3, 2)
    plain = make_optimizer(network, settings)
    network(torch.ones(1, 3)).sum().backward()
    set_lr(plain, 0.02)
    plain.step()
    state = plain.state_dict()
    recorded = make_optimizer(network, settings, fused=name != "rmsprop", recorded=CPU)
    rates = [group["lr"] for group in recorded.param_groups]
    load_optimizer(recorded, state)
    set_lr(recorded, 0.03)
    (group,) = recorded.param_groups
    assert group["lr"] is rates[0]
    assert float(rates[0]) == pytest.approx(0.03)
    assert bool(group["fused"] if name != "rmsprop" else group["capturable"])
    load_optimizer(plain, recorded.state_dict())
    set_lr(plain, 0.01)
    (group,) = plain.param_groups
    assert (group["lr"], bool(group.get("fused")), bool(group.get("capturable"))) == (
        0.01,
        False,
        False,
    )
    plain.step()


def test_records_from_before_mean_what_they_meant(tmp_path: Path) -> None:
    before = RuntimeConfig.recorded({"precision": "float32", "threads": 2})
    assert (before.deterministic, before.compile) == (True, "none")
    path = tmp_path / "best.toml"
    written = config(runtime={"precision": "float32", "memory_format": "contiguous", "threads": 1})
    lines = dump_config(written, {"study": "old"}).splitlines()
    old = [line for line in lines if not line.startswith(("deterministic", "compile"))]
    path.write_text("\n".join(old))
    read = load_config(path)[0].runtime
    assert (read.deterministic, read.compile) == (True, "none")
    path.write_text("\n".join(old).partition("[provenance]")[0])  # by hand, and new
    read = load_config(path)[0].runtime
    assert (read.deterministic, read.compile) == ("auto", "auto")


def test_a_checkpoint_from_before_goes_on(tmp_path: Path) -> None:
    runtime = {"precision": "float32", "memory_format": "contiguous", "threads": 1}
    same = runtime | {"deterministic": True, "compile": "none"}
    (result,) = run(config(epochs=1, runtime=same), checkpoint=files(tmp_path))
    assert result.checkpoint is not None
    kept = Checkpoint.load(result.checkpoint)
    for name in ("deterministic", "compile"):
        del kept.config["runtime"][name]
    kept.require(config(epochs=1, runtime=same))
    with pytest.raises(Damaged, match=r"runtime.deterministic = True instead of False"):
        kept.require(config(epochs=1, runtime=same | {"deterministic": False}))


@pytest.mark.parametrize("value", [1, "yes", "true", None])
def test_deterministic_is_auto_true_or_false(value: object) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.deterministic: .*auto"):
        TrainConfig.parse({"runtime": {"deterministic": value}})


def test_the_data_are_as_these_tests_count_them() -> None:
    assert divmod(len(DATA.train), config().batch_size) == (4, 6)
