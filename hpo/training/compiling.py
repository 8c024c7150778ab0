"""A faster training step: the network compiled by torch.compile, the step replayed as a CUDA graph.

Both are for the full batches of an epoch; a short last one runs as it is. What cannot be compiled
or recorded runs as it is, too, and the log says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from hpo.config.base import is_function_name
from hpo.config.train import TrainConfig
from hpo.paths import Home
from hpo.training.augment import ops

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before one is recorded: libraries prepare themselves and the optimizer makes its state."""
WAITED = "called a synchronizing CUDA operation"
"""Part of the error that torch raises for waiting where that is forbidden."""
MOST_COMPILED = 64
"""Networks of one architecture in one process; torch stops compiling after 8 by default."""

Labels = Tensor | ops.Mixed
Parts = list[tuple[Tensor, Tensor, int]]
"""Mean loss (), correct images () and number of images of each micro-batch of a step."""
Step = Callable[[Tensor, Labels], Parts]
"""Takes an optimizer step on images and labels."""


def is_own(config: TrainConfig) -> bool:
    """Return whether code of the user's runs in a step: a recording would repeat what its Python
    did once."""
    return is_function_name(config.model.architecture) or is_function_name(config.loss)


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return `network` compiled for each batch size that it meets; compilation happens at its first
    calls. All workers of a host share one cache."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Home.default().cache / "compiled"))
    import torch._dynamo.config  # takes seconds, and settles where the cache is

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_COMPILED)
    return torch.compile(network, dynamic=False)


def reason(error: Exception) -> str:
    """Return the first line of `error`."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


class CannotRecord(Exception):
    """Raised for work that waits for the device."""


class Recorder(Protocol):
    """Records work on a device so that it can be repeated."""

    def warm_up(self, work: Callable[[], Parts], *, last: bool) -> Parts:
        """Do `work` as before a recording; the `last` time raise CannotRecord, in the middle of it,
        if it waits for the device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats `work` on the same memory. Raises RuntimeError if it cannot be
        recorded."""


class CudaRecorder:
    """Records CUDA graphs (torch.cuda.graph), on a stream of its own as they have to be."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Callable[[], Parts], *, last: bool) -> Parts:
        """Do `work` on the stream on which it will be recorded. A recording that fails because the
        work waits would leave torch's random generator unusable, so that is found out before."""
        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            torch.cuda.set_sync_debug_mode("error" if last else mode)
            with torch.cuda.stream(self._stream):
                return work()
        except RuntimeError as error:
            if WAITED in str(error):
                raise CannotRecord("it waits for the device") from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`. Threads that prepare batches go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with (
            # A recording that fails leaves its stream as the current one.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


class RecordedStep:
    """An optimizer step on batches of one size, recorded after WARM_UP of them and then replayed on
    copies of its inputs."""

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._warmed, self._given_up = 0, False
        self._replay: Callable[[], None] | None = None
        self._parts: Parts = []

    def __call__(self, images: Tensor, labels: Labels) -> Parts:
        """Take a step; the returned tensors hold until the next one."""
        if self._given_up:
            return self._step(images, labels)
        if self._warmed < WARM_UP:
            return self._warm_up(partial(self._step, images, labels))
        if self._replay is None:
            self._record(images, labels)
        if self._replay is None:
            return self._step(images, labels)
        self._fill(images, labels)
        self._replay()
        return self._parts

    def _warm_up(self, work: Callable[[], Parts]) -> Parts:
        self._warmed += 1
        try:
            return self._recorder.warm_up(work, last=self._warmed == WARM_UP)
        except CannotRecord as error:
            self._give_up(error)
        return work()

    def _give_up(self, error: Exception) -> None:
        log.warning("steps are not recorded as a CUDA graph: %s", reason(error))
        self._given_up = True

    def _record(self, images: Tensor, labels: Labels) -> None:
        self._images, self._labels = torch.empty_like(images), _empty_like(labels, images.device)

        def work() -> None:
            self._parts = self._step(self._images, self._labels)

        try:
            self._replay = self._recorder.record(work)
        except RuntimeError as error:  # out of memory too: a recording needs memory of its own
            self._give_up(error)
            del self._images, self._labels

    def _fill(self, images: Tensor, labels: Labels) -> None:
        self._images.copy_(images)
        if isinstance(labels, Tensor):
            assert isinstance(self._labels, Tensor)
            self._labels.copy_(labels)
            return
        assert isinstance(self._labels, ops.Mixed)
        assert isinstance(self._labels.weight, Tensor)
        self._labels.labels.copy_(labels.labels)
        self._labels.others.copy_(labels.others)
        self._labels.weight.fill_(labels.weight)


def _empty_like(labels: Labels, device: torch.device) -> Labels:
    if isinstance(labels, Tensor):
        return torch.empty_like(labels)
    weight = torch.empty((), device=device)
    return ops.Mixed(torch.empty_like(labels.labels), torch.empty_like(labels.others), weight)
