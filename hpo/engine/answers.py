"""What networks answer on the same images: kept, judged, and averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.engine.arrays import read_arrays, write_arrays
from hpo.engine.control import Control
from hpo.engine.learner import Batch, Evaluation, Judge, autocast
from hpo.engine.metrics import Counts
from hpo.errors import DataError

Network = Callable[[Tensor], Tensor]
"""Maps (B, 3, S, S) to logits (B, C) on the same device."""


@dataclass(frozen=True)
class Answers:
    """A network on a set of images, in the set's order."""

    logits: NDArray[np.float32]
    """(N, C)."""
    labels: Counts
    """(N,) true classes."""
    evaluation: Evaluation


def ask(
    networks: Mapping[str, Network],
    batches: Iterable[Batch],
    *,
    classes: int,
    device: torch.device,
    precision: str,
    control: Control,
) -> dict[str, Answers]:
    """Run all `networks`, in eval mode, in one pass over `batches`.

    `control.step` is asked before every batch and told of the images before it.
    """
    judges = {name: Judge(classes, device) for name in networks}
    kept: dict[str, list[Tensor]] = {name: [] for name in networks}
    images = 0
    with torch.inference_mode():
        for pixels, labels in batches:
            control.step(epoch=0, images=images)
            for name, network in networks.items():
                with autocast(device, precision):
                    logits = network(pixels).float()
                judges[name].add(logits, labels)
                kept[name].append(logits.cpu())
            images = len(labels)
        control.step(epoch=0, images=images)
    found = {name: judge.result() for name, judge in judges.items()}
    return {
        name: Answers(torch.cat(kept[name]).numpy(), one.labels, one) for name, one in found.items()
    }


def mean_evaluation(logits: Sequence[NDArray[np.float32]], labels: Counts) -> Evaluation:
    """The mean of the members' probabilities, judged. `logits` are (N, C) for each member."""
    stacked = torch.stack([torch.from_numpy(one).double() for one in logits])
    # As logarithms, so that no small probability becomes 0.
    mean = stacked.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))
    judge = Judge(mean.shape[1], torch.device("cpu"))
    judge.add(mean, torch.from_numpy(labels))
    return judge.result()


@dataclass(frozen=True)
class Stored:
    """Answers as a file has them: `names` (N,) of the images beside them."""

    logits: NDArray[np.float32]
    labels: Counts
    names: NDArray[np.str_]


def save_answers(path: Path, answers: Answers, names: Sequence[str]) -> None:
    """Write as NPZ (logits, labels, names), whole or not at all. Raises DiskFull."""
    write_arrays(
        path,
        compressed=True,
        logits=answers.logits,
        labels=answers.labels,
        names=np.array(names, np.str_),
    )


def load_answers(path: Path) -> Stored:
    """What `save_answers` wrote. Raises DataError for a file that is damaged."""
    found = read_arrays(path, "remove it, and test the weights beside it: hpo evaluate")
    try:
        return Stored(found["logits"], found["labels"], found["names"])
    except KeyError as error:
        raise DataError(f"{path} cannot be read: it has no {error}; remove it") from error
