"""Devices by name, the fastest arithmetic on them, and the measured cost of a training step."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.config.train import RuntimeConfig, TrainConfig
from hpo.control import ProgressCallback, no_progress
from hpo.data.images import Images
from hpo.errors import InputError
from hpo.training.arithmetic import is_fast, set_arithmetic
from hpo.training.compiling import WARM_UP, is_own
from hpo.training.feature_cache import Extractor, Preprocessing, find_cut_or_obstacle
from hpo.training.learner import Batch, Learner, autocast, memory_format
from hpo.training.loader import TrainBatches
from hpo.training.memory import is_lack, release

# Simplest first: the choice among those that are about as fast.
PRECISIONS = ("float32", "bfloat16")
FORMATS = ("contiguous", "channels_last")
RECORDINGS = ("none", "cuda-graph")
CLEARLY = 1.1
"""Factor by which a less simple choice has to be faster."""
FEW, SHORT_S = 2, 0.1
"""Images of each choice's first step, and how long its timed steps should take."""
STEPS, ENOUGH_S, HOPELESS = 6, 0.25, 3.0
"""Steps of each choice; seconds after which fewer are enough; slowdown relative to the best so far
at which a choice is dropped. The fastest step counts: other processes may use the same cores."""
PAYS_S = 300.0
"""Seconds of training from which compiling a network is tried: it takes up to minutes, and tens of
seconds in each process after the first one."""
FILLED = 256
"""Largest batch with which choices are compared on a GPU."""
LONG_S = 6.0
"""Seconds after which fewer than STEPS are enough when a cost is reported, the median of them."""


def torch_device(name: str) -> torch.device:
    """Return the device called `name`: cpu, cuda, cuda:1, mps. Raises InputError naming the
    available devices if it is not one of them."""
    there = available_devices()
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise InputError(f"device {name!r} is not available here; allowed: {', '.join(there)}")
    return torch.device(wanted)


def default_device() -> str:
    """Return the first GPU that CUDA has, else the CPU."""
    return "cuda:0" if torch.cuda.device_count() else "cpu"


def available_devices() -> list[str]:
    """Return the names of the devices of this machine on which training works."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


def processor_name(device: torch.device) -> str:
    """Return the name of what computes, and of a CPU its instructions, which decide the order of
    sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def resolve(
    config: TrainConfig,
    *,
    classes: int,
    device: torch.device,
    threads: int,
    steps: int = 0,
    tick: ProgressCallback = no_progress,
) -> RuntimeConfig:
    """Return `config.runtime` with `auto` replaced by what trains this network fastest on `device`,
    measured on random images; the simpler choice unless another is clearly faster. A precision that
    the device only emulates is not tried; on a CPU any other choice is dropped after one step of
    FEW images if that shows it to be hopeless; on a GPU compiling is tried only if a training of
    `steps` is long enough for that to pay. `threads` replaces 0; `tick` is called for each choice.

    Takes about ENOUGH_S for each choice of a small network, and three steps of FEW images for each
    of a large one.
    """
    runtime = with_defaults(config.runtime, device, threads)
    if device.type not in ("cpu", "cuda"):
        return choices_of(runtime, PRECISIONS, recorded=False)[0]
    with _arithmetic(runtime, device):
        there = tuple(one for one in PRECISIONS if not is_too_slow(one, device))
        recorded = is_fast(runtime, device) and not is_own(config)
        choices = choices_of(runtime, there, recorded=recorded)
        if len(choices) == 1:
            return choices[0]
        comparison, seconds = Comparison(config, classes, device), []
        for choice in choices:
            tick()
            seconds.append(comparison.step_seconds(choice))
        chosen = choices[fastest(seconds)]
        long = steps * min(seconds) >= PAYS_S
        if not (recorded and runtime.compile == "auto" and long):
            return chosen
        compiled = chosen.model_copy(update={"compile": "inductor"})
        tick()
        began = time.perf_counter()
        step_s = comparison.step_seconds(compiled)
        prepare_s = time.perf_counter() - began
    return compiled if pays(prepare_s, step_s, steps, min(seconds)) else chosen


def with_defaults(runtime: RuntimeConfig, device: torch.device, threads: int) -> RuntimeConfig:
    """Return `runtime` with what needs no measurement: its threads, and whether a result is to have
    the same bits each time."""
    fields: dict[str, Any] = {"threads": runtime.threads or threads}
    if runtime.deterministic == "auto":
        fields["deterministic"] = device.type != "cuda"
    return runtime.model_copy(update=fields)


def choices_of(
    runtime: RuntimeConfig, precisions: Sequence[str], *, recorded: bool
) -> list[RuntimeConfig]:
    """Return what `auto` stands for in `runtime`, simplest first; `recorded`: steps may be."""
    own = (runtime.precision,), (runtime.memory_format,), (runtime.compile,)
    auto = precisions, FORMATS, RECORDINGS if recorded else RECORDINGS[:1]
    tried = [open_ if one == ("auto",) else one for one, open_ in zip(own, auto, strict=True)]
    return [
        runtime.model_copy(
            update={"precision": precision, "memory_format": layout, "compile": compiled}
        )
        for precision, layout, compiled in itertools.product(*tried)
    ]


def pays(prepare_s: float, step_s: float, steps: int, best_s: float) -> bool:
    """Return whether `steps` that take `step_s` each after `prepare_s` are clearly faster than as
    many that take `best_s`."""
    return CLEARLY * (prepare_s + steps * step_s) < steps * best_s


def is_too_slow(precision: str, device: torch.device) -> bool:
    """Return whether a few small layers take HOPELESS times as long in `precision` as in float32;
    takes milliseconds."""
    if precision == "float32":
        return False
    images = torch.zeros(4, 32, 28, 28, device=device)
    layers = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Linear(26, 64)).to(device)

    def least(precision: str) -> float:
        with torch.no_grad(), autocast(device, precision):
            layers(images)  # the first time libraries are loaded and algorithms chosen
            return min(_times(lambda: layers(images), device, math.inf))

    return least(precision) > HOPELESS * least("float32")


def fastest(seconds: list[float]) -> int:
    """Return the index of the first of `seconds`, simplest first, that no other beats clearly."""
    return next(i for i, own in enumerate(seconds) if own <= CLEARLY * min(seconds))


@dataclass
class Comparison:
    """Steps of one configuration computed in several ways, one after another."""

    config: TrainConfig
    classes: int
    device: torch.device
    few_s: float = math.inf
    """Seconds of the shortest first step of FEW images so far."""
    best_s: float = math.inf
    images: int = 0
    """Images of the timed steps; 0 before the first choice decides it."""
    micro_batch: int = 0
    """Images computed at once; 0: those of the batch."""

    def step_seconds(self, runtime: RuntimeConfig) -> float:
        """Return the seconds of one training step, with as many images at once as fit in memory;
        infinity if the first one shows that it is hopeless, or if another choice takes more images
        at once than this can."""
        while True:
            try:
                seconds = self._measured(runtime)
                break
            except RuntimeError as error:
                if not is_lack(error):
                    raise
            if self.best_s < math.inf or not self._halved():
                return math.inf
        self.best_s = min(self.best_s, seconds)
        return seconds

    def _measured(self, runtime: RuntimeConfig) -> float:
        if self.device.type == "cuda":
            release(self.device)  # of the choice before: its recording keeps all outputs
        learner = _learner(self.config, runtime, self.classes, self.device, self.micro_batch)
        if self.device.type == "cpu" and self._is_hopeless(learner):
            return math.inf
        self.images = self.images or self._enough_images(learner)
        batch = _random_batch(learner.config, self.images, self.classes, self.device)
        return min(_step_times(learner, batch, self.best_s))

    def _halved(self) -> bool:
        """Halve the micro-batch; return False where it is as small as can be."""
        self.micro_batch = (self.micro_batch or self.images) // 2
        return self.micro_batch >= FEW

    def _is_hopeless(self, learner: Learner) -> bool:
        first_s = self._seconds(learner, FEW)
        self.few_s = min(self.few_s, first_s)
        return first_s > HOPELESS * self.few_s

    def _enough_images(self, learner: Learner) -> int:
        """Return how many images keep a CPU busy for no longer than a short step, or fill a GPU."""
        if self.device.type == "cuda":
            return learner.config.batch_size
        images = int(FEW * SHORT_S / self._seconds(learner, FEW))
        return max(FEW, min(self.config.batch_size, images))

    def _seconds(self, learner: Learner, images: int) -> float:
        batch = _random_batch(learner.config, images, self.classes, self.device)
        learner.train_mode()
        return seconds_of(lambda: learner.step(batch, lr=1e-6), self.device)


def _learner(
    config: TrainConfig,
    runtime: RuntimeConfig,
    classes: int,
    device: torch.device,
    micro_batch: int,
) -> Learner:
    batch_size = min(config.batch_size, FILLED) if device.type == "cuda" else config.batch_size
    trial = config.model_copy(update={"runtime": runtime, "batch_size": batch_size})
    # In the last phase, when most is learning as a rule.
    return Learner(
        trial,
        classes=classes,
        device=device,
        micro_batch=micro_batch,
        pretrained=False,
        epoch=trial.epochs,
    )


def _step_times(learner: Learner, batch: Batch, best: float) -> Iterator[float]:
    """Yield the seconds of a few steps, on a CPU including the first one, which also prepares;
    stops early if the choice is hopeless."""
    learner.train_mode()
    _prepare(learner, batch)
    return _times(lambda: learner.step(batch, lr=1e-6), learner.device, best)


def _prepare(learner: Learner, batch: Batch) -> None:
    """Take the steps on a GPU in which kernels are loaded and chosen, and the step recorded."""
    full = len(batch[1]) == learner.config.batch_size
    if learner.device.type == "cuda" or (learner.is_compiled and full):
        for _ in range(WARM_UP + 2):
            learner.step(batch, lr=1e-6)


def _times(
    work: Callable[[], object], device: torch.device, best: float, enough: float = ENOUGH_S
) -> Iterator[float]:
    spent = 0.0
    for _ in range(STEPS):
        seconds = seconds_of(work, device)
        yield seconds
        spent += seconds
        if spent > enough or seconds > HOPELESS * best:
            return


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, those of the device included."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def has_lacked_memory(device: torch.device) -> bool:
    """Return whether an allocation of this process on a GPU ever failed."""
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return bool(stats.get("num_ooms", 0))


def _random_batch(config: TrainConfig, images: int, classes: int, device: torch.device) -> Batch:
    side = config.data.image_size
    pixels = torch.randn(images, 3, side, side, device=device)
    layout = memory_format(config.runtime.memory_format)
    labels = torch.arange(images, device=device) % classes
    return pixels.contiguous(memory_format=layout), labels


@contextmanager
def _arithmetic(runtime: RuntimeConfig, device: torch.device) -> Iterator[None]:
    """Compute as `runtime` says; afterwards with as many threads as before."""
    before = torch.get_num_threads()
    set_arithmetic(runtime, device)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class StepCost:
    """The measured cost of one training step."""

    seconds: float
    """Median of a few steps after the first one, which also prepares."""
    peak_memory_mb: float
    """In MB (10^6 bytes). CUDA: measured. Otherwise: weights, gradients, the optimizer's state, the
    batch, and the tensors saved by autograd. Includes the networks of all folds."""
    images: int
    spread: tuple[float, float] = (1.0, 1.0)
    """The fastest and the slowest step, relative to the median."""


def measure_step(config: TrainConfig, *, classes: int, device: torch.device) -> StepCost:
    """Measure a training step of `config` at its batch size on `device`, on random images.

    Takes a first step and up to STEPS more, fewer if they take LONG_S. Raises what building the
    network raises, and torch.OutOfMemoryError.
    """
    with _arithmetic(config.runtime, device):
        if device.type == "cuda":
            release(device)
            torch.cuda.reset_peak_memory_stats(device)
        learner = Learner(
            config,
            classes=classes,
            device=device,
            micro_batch=config.runtime.micro_batch,
            pretrained=False,
            epoch=config.epochs,
        )
        batch = _random_batch(config, config.batch_size, classes, device)
        learner.train_mode()
        with _SavedTensors(learner) as saved:
            learner.step(
                (batch[0][: learner.micro_batch], batch[1][: learner.micro_batch]), lr=1e-6
            )
        _prepare(learner, batch)
        taken = list(_times(lambda: learner.step(batch, lr=1e-6), device, math.inf, LONG_S))
    if device.type == "cuda":
        bytes_ = float(torch.cuda.max_memory_allocated(device))
    else:
        bytes_ = saved.bytes + _state_bytes(learner) + batch[0].nbytes
    bytes_ += ((config.data.folds or 1) - 1) * _state_bytes(learner)
    seconds = statistics.median(taken)
    spread = (min(taken) / seconds, max(taken) / seconds) if seconds else (1.0, 1.0)
    return StepCost(seconds, bytes_ / 1e6, config.batch_size, spread)


def measure_loader(config: TrainConfig, images: Images, device: torch.device) -> float:
    """Measure the seconds to load one of `images` for a training step of `config`: cropped,
    augmented and normalised, on the device."""
    if not len(images):
        return 0.0
    with _arithmetic(config.runtime, device):
        batches = TrainBatches(
            images,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            augment=config.augment,
            image_size=config.data.image_size,
            batch_size=min(config.batch_size, len(images)),
            device=device,
        )

        def load() -> None:
            for _ in batches.epoch(1):
                pass

        load()
        return _median(load, device) / len(images)


@dataclass(frozen=True)
class FeatureCacheCost:
    """The measured cost of frozen layers with cached outputs (see `hpo.training.feature_cache`)."""

    bytes: int
    """Size of the outputs for one image."""
    compute_s: float
    """Seconds to compute them."""
    step_s: float
    """Seconds of a training step on cached outputs; 0 if nothing is trained."""
    images: int
    """Images in that step."""


def measure_feature_cache(
    config: TrainConfig, *, classes: int, device: torch.device
) -> FeatureCacheCost | None:
    """Measure the cost of caching the outputs of frozen layers on `device`, on random images and in
    the last phase; return None if they would not be cached whatever the limit of the cache. Raises
    as `measure_step`."""
    with _arithmetic(config.runtime, device):
        learner = Learner(
            config, classes=classes, device=device, pretrained=False, epoch=config.epochs
        )
        cut, _ = find_cut_or_obstacle(learner.model, learner.frozen, config, device)
        if cut is None:
            return None
        black = Preprocessing((0.0,) * 3, (1.0,) * 3, config, device)
        extractor = Extractor(learner.model, cut, black, Path())
        pixels, _ = _random_batch(config, extractor.batch, classes, device)
        extractor.run(pixels)
        compute = _median(lambda: extractor.run(pixels), device) / len(pixels)
        learner.use_features(cut)
        step = (
            0.0 if config.frozen else _cached_step_seconds(learner, extractor.run(pixels), classes)
        )
    return FeatureCacheCost(cut.packing.size, compute, step, config.batch_size)


def _cached_step_seconds(learner: Learner, rows: Tensor, classes: int) -> float:
    """Return the seconds of a step on a batch of cached outputs, repeated from the few in
    `rows`."""
    index = torch.arange(learner.config.batch_size, device=learner.device)
    batch = rows[index % len(rows)], index % classes
    learner.train_mode()
    learner.step(batch, lr=1e-6)
    _prepare(learner, batch)
    return _median(lambda: learner.step(batch, lr=1e-6), learner.device)


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `work` over a few runs."""
    return statistics.median(_times(work, device, math.inf, LONG_S))


class _SavedTensors:
    """Counts the bytes that autograd saves for the backward pass, without weights."""

    def __init__(self, learner: Learner) -> None:
        self.bytes = 0
        self._known = {part.untyped_storage().data_ptr() for part in learner.model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _state_bytes(learner: Learner) -> int:
    """Return the bytes of weights, gradients and the optimizer's state."""
    state = [
        value
        for values in learner.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    weights = list(learner.model.state_dict().values())
    weights += learner.average.model.state_dict().values() if learner.average else []
    gradients = [part.grad for part in learner.model.parameters() if part.grad is not None]
    return sum(tensor.nbytes for tensor in [*state, *weights, *gradients])
