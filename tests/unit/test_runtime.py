"""Devices by name, what is fastest, what a step costs."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from hpo.config.train import RuntimeConfig, TrainConfig
from hpo.errors import InputError
from hpo.training import device as runtime
from hpo.training import loader
from hpo.training.arithmetic import set_arithmetic

CPU = torch.device("cpu")


def config(**fields: Any) -> TrainConfig:
    base = {"batch_size": 8, "data": {"image_size": 8}, "model": {"cnn": {"filters": [4, 8]}}}
    return TrainConfig.parse(base | fields)


def test_devices_by_name() -> None:
    assert runtime.torch_device("cpu") == CPU
    for name in ("cuda:99", "tpu", "", "cpu:3"):
        with pytest.raises(InputError, match="not available here; allowed: cpu"):
            runtime.torch_device(name)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0),
        ([1.0, 0.95, 0.93, 0.92], 0),
        ([1.0, 0.5, 0.48, 0.47], 1),
        ([1.0, 0.9, 0.8, 0.4], 3),
        ([float("inf"), 0.9, 0.8, 0.85], 2),
    ],
)
def test_the_simplest_of_the_fast_ones_is_chosen(seconds: list[float], chosen: int) -> None:
    assert runtime.fastest(seconds) == chosen


def test_what_is_auto_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        ("float32", "contiguous"): 1.0,
        ("float32", "channels_last"): 0.5,
        ("bfloat16", "contiguous"): 0.9,
        ("bfloat16", "channels_last"): 0.49,
    }
    asked = []

    def timed(_comparison: object, choice: Any) -> float:
        asked.append((choice.precision, choice.memory_format))
        return times[asked[-1]]

    monkeypatch.setattr(runtime.Comparison, "step_seconds", timed)
    monkeypatch.setattr(runtime, "is_too_slow", lambda *_: False)
    found = runtime.resolve(config(), classes=3, device=CPU, threads=3)
    assert asked == list(itertools.product(runtime.PRECISIONS, runtime.FORMATS))
    assert (found.precision, found.memory_format) == ("float32", "channels_last")
    assert found.threads == 3


class Slow:
    """A convolution takes long in bfloat16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        original = nn.Conv2d.forward

        def forward(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds if torch.is_autocast_enabled("cpu") else 0.01)
            return original(layer, images)

        monkeypatch.setattr(nn.Conv2d, "forward", forward)


@pytest.mark.parametrize(("seconds", "dropped"), [(0.1, True), (0.01, False)])
def test_a_precision_that_is_imitated_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, seconds: float, dropped: bool
) -> None:
    Slow(monkeypatch, seconds)
    asked = set()

    def timed(_comparison: object, choice: Any) -> float:
        asked.add(choice.precision)
        return 1.0

    monkeypatch.setattr(runtime.Comparison, "step_seconds", timed)
    runtime.resolve(config(), classes=3, device=CPU, threads=1)
    assert asked == ({"float32"} if dropped else set(runtime.PRECISIONS))


def test_a_first_call_that_loads_libraries_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's on a GPU, which takes longer than all others together."""
    cold = iter([0.3])
    original = nn.Conv2d.forward

    def forward(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        time.sleep(next(cold, 0.0) if torch.is_autocast_enabled("cpu") else 0.01)
        return original(layer, images)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    assert not runtime.is_too_slow("bfloat16", CPU)


class FakeSteps:
    """An image takes the seconds that `speeds` say of its precision and layout; `sizes` keeps how
    many images each step had."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, speeds: dict[tuple[str, str], float]
    ) -> None:
        self.seconds = 0.0
        self.sizes: dict[tuple[str, str], list[int]] = {choice: [] for choice in speeds}

        def step(learner: runtime.Learner, batch: runtime.Batch, lr: float) -> None:
            chosen = learner.config.runtime.precision, learner.config.runtime.memory_format
            self.sizes[chosen].append(len(batch[0]))
            self.seconds = speeds[chosen] * len(batch[0])

        def seconds_of(work: Callable[[], object], device: torch.device) -> float:
            work()
            return self.seconds

        monkeypatch.setattr(runtime.Learner, "step", step)
        monkeypatch.setattr(runtime, "seconds_of", seconds_of)
        monkeypatch.setattr(runtime, "is_too_slow", lambda *_: False)


def test_a_hopeless_choice_takes_one_step_of_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = FakeSteps(
        monkeypatch,
        {
            ("float32", "contiguous"): 0.010,
            ("float32", "channels_last"): 0.005,
            ("bfloat16", "contiguous"): 0.100,
            ("bfloat16", "channels_last"): 0.004,
        },
    )
    found = runtime.resolve(config(batch_size=64), classes=3, device=CPU, threads=1)
    assert (found.precision, found.memory_format) == ("bfloat16", "channels_last")
    sizes = steps.sizes
    assert sizes["bfloat16", "contiguous"] == [runtime.FEW]
    assert sizes["float32", "contiguous"][:2] == [runtime.FEW] * 2
    timed = {choice: taken[-1] for choice, taken in sizes.items() if len(taken) > 1}
    assert set(timed.values()) == {10}, "a step of the first choice takes a tenth of a second"


@pytest.mark.parametrize("seconds", [0.0001, 0.01, 2.0])
def test_the_time_of_a_choice_is_bounded(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    speeds = dict.fromkeys(itertools.product(runtime.PRECISIONS, runtime.FORMATS), seconds)
    steps = FakeSteps(monkeypatch, speeds)
    ticks: list[int] = []
    wanted = config(batch_size=64)
    tick = partial(ticks.append, 1)
    runtime.resolve(wanted, classes=3, device=CPU, threads=1, tick=tick)
    assert len(ticks) == len(speeds)
    longest = runtime.ENOUGH_S + runtime.SHORT_S + 3 * runtime.FEW * seconds
    for choice, sizes in steps.sizes.items():
        assert sum(sizes) * seconds <= longest, choice


def test_the_cost_of_a_step_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step that another program slows down changes nothing."""
    taken = iter([5.0, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2])
    monkeypatch.setattr(runtime, "seconds_of", lambda work, device: next(taken))
    monkeypatch.setattr(runtime, "LONG_S", 100.0)
    assert runtime.measure_step(config(), classes=3, device=CPU).seconds == 0.2


def test_each_choice_on_a_gpu_has_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step keeps the outputs of all layers until its network is collected."""
    done: list[str] = []
    monkeypatch.setattr(runtime, "release", lambda device: done.append("released"))
    monkeypatch.setattr(runtime, "_learner", lambda *_: done.append("built") or FakeLearner())  # type: ignore[func-returns-value]
    monkeypatch.setattr(runtime, "_random_batch", lambda *_: None)
    monkeypatch.setattr(runtime, "_step_times", lambda *_: [0.1])
    comparison = runtime.Comparison(config(), 3, torch.device("cuda:0"))
    for _ in range(2):
        assert comparison.step_seconds(RuntimeConfig()) == 0.1
    assert done == ["released", "built"] * 2


class FakeLearner:
    config = config()


@pytest.mark.parametrize(("most", "chosen"), [(4, "bfloat16"), (0, "float32")])
def test_what_does_not_fit_is_compared_in_smaller_parts(
    monkeypatch: pytest.MonkeyPatch, most: int, chosen: str
) -> None:
    """As a training would go on; a batch that is too large for all does not decide for the
    simplest."""

    def seconds_of(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 0.001 if parts[-1][1] == "bfloat16" else 0.01

    def step(learner: runtime.Learner, batch: runtime.Batch, lr: float) -> None:
        parts.append((min(len(batch[0]), learner.micro_batch), learner.config.runtime.precision))
        if parts[-1][0] > max(most, runtime.FEW) or not most:
            raise torch.OutOfMemoryError("out of memory")

    parts: list[tuple[int, str]] = []
    monkeypatch.setattr(runtime.Learner, "step", step)
    monkeypatch.setattr(runtime, "seconds_of", seconds_of)
    monkeypatch.setattr(runtime, "is_too_slow", lambda *_: False)
    found = runtime.resolve(config(batch_size=16), classes=3, device=CPU, threads=1)
    assert found.precision == chosen


def test_memory_of_tensors_that_are_gone_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))

    def empty_cache() -> None:
        nonlocal free
        free = 900

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert loader._fits(400, True, torch.device("cuda:0"))
    assert not loader._fits(500, True, torch.device("cuda:0"))


def test_what_is_given_stays() -> None:
    given = {"precision": "bfloat16", "memory_format": "contiguous", "threads": 2, "micro_batch": 4}
    given |= {"deterministic": False, "compile": "inductor"}
    settings = config(runtime=given)
    assert runtime.resolve(settings, classes=3, device=CPU, threads=1) == settings.runtime


@pytest.mark.parametrize(
    ("given", "device", "chosen"),
    [
        ("auto", "cpu", True),
        ("auto", "mps", True),
        ("auto", "cuda", False),
        (True, "cuda:1", True),
        (False, "cpu", False),
    ],
)
def test_the_same_bits_are_the_default_where_they_cost_nothing(
    given: Any, device: str, chosen: bool
) -> None:
    settings = RuntimeConfig(deterministic=given)
    assert runtime.with_defaults(settings, torch.device(device), 2).deterministic is chosen


@pytest.mark.parametrize(
    ("given", "recorded", "tried"),
    [
        ({}, True, list(itertools.product(("float32",), runtime.FORMATS, runtime.RECORDINGS))),
        ({}, False, [("float32", one, "none") for one in runtime.FORMATS]),
        (
            {"memory_format": "contiguous", "compile": "inductor"},
            True,
            [("float32", "contiguous", "inductor")],
        ),
    ],
)
def test_steps_are_recorded_on_trial_where_they_can_be(
    given: Any, recorded: bool, tried: list[Any]
) -> None:
    choices = runtime.choices_of(RuntimeConfig(**given), ("float32",), recorded=recorded)
    assert [(one.precision, one.memory_format, one.compile) for one in choices] == tried


@pytest.mark.parametrize(
    ("prepare_s", "step_s", "steps", "chosen"),
    [
        (60.0, 0.05, 10_000, True),
        (60.0, 0.05, 1_000, False),  # 110 s against 100
        (0.0, 0.095, 10_000, False),  # not clearly
        (0.0, math.inf, 10_000, False),  # did not fit in memory
    ],
)
def test_a_network_is_compiled_where_that_is_made_up_for(
    prepare_s: float, step_s: float, steps: int, chosen: bool
) -> None:
    assert runtime.pays(prepare_s, step_s, steps, best_s=0.1) is chosen


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """GPUs that become the current one; what a test changes of torch's settings is put back."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield found
    cudnn.benchmark, cudnn.deterministic = before
    matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(False)
    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        enable(True)


def test_only_a_fast_gpu_changes_the_arithmetic(chosen: list[torch.device]) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision
    set_arithmetic(RuntimeConfig(deterministic=False), CPU)
    assert (cudnn.benchmark, cudnn.deterministic, matmul.fp32_precision) == (False, True, before)
    gpu = torch.device("cuda:1")
    assert not chosen
    for same in (False, True, "auto", False):
        fast = same is False
        set_arithmetic(RuntimeConfig(deterministic=same), gpu)
        assert chosen.pop() == gpu, "what names no device is on this one"
        assert (cudnn.benchmark, cudnn.deterministic) == (fast, not fast)
        assert matmul.fp32_precision == ("tf32" if fast else "ieee")
        assert torch.get_float32_matmul_precision() == ("high" if fast else "highest")
        assert torch.are_deterministic_algorithms_enabled() is not fast
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not fast
        assert torch.backends.cuda.flash_sdp_enabled() is fast
        assert torch.backends.cuda.mem_efficient_sdp_enabled() is fast
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_measuring_leaves_no_auto_and_the_threads_alone() -> None:
    before = torch.get_num_threads()
    found = runtime.resolve(config(), classes=3, device=CPU, threads=1)
    assert "auto" not in (found.precision, found.memory_format)
    assert torch.get_num_threads() == before


def test_a_step_keeps_more_at_a_larger_batch() -> None:
    small, large = (
        runtime.measure_step(config(batch_size=size), classes=3, device=CPU) for size in (8, 80)
    )
    assert small.seconds > 0
    assert large.images == 80
    assert 5 * small.peak_memory_mb < large.peak_memory_mb < 11 * small.peak_memory_mb


def test_micro_batches_keep_less() -> None:
    whole = runtime.measure_step(config(batch_size=64), classes=3, device=CPU)
    parts = runtime.measure_step(
        config(batch_size=64, runtime={"micro_batch": 8}), classes=3, device=CPU
    )
    assert parts.peak_memory_mb < whole.peak_memory_mb / 2
