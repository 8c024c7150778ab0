"""Checkpoints and weights: written atomically, read without running code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hpo.config.base import flatten
from hpo.config.model import ModelConfig
from hpo.config.train import BEFORE, TrainConfig
from hpo.errors import Damaged, DataError
from hpo.io import atomic_write, blank, find_damage, with_checksum
from hpo.training import models, pretrained
from hpo.training.pretrained import safe_load

State = dict[str, Tensor]

FREE = ("data.root", "data.labels", "data.download", "data.cache_limit_gb", "data.loader_workers",
        "runtime.micro_batch")  # fmt: skip
"""Fields that may differ on another host that resumes from a checkpoint."""


PER_NETWORK = "model", "best", "optimizer", "average", "averaged", "predictions"
"""Fields that a checkpoint has once per network."""


def best_of(network: Mapping[str, Any]) -> State:
    """Return the weights of the best epoch: `best` if stored, otherwise the current ones (the EMA
    `average` if enabled, otherwise `model`)."""
    current: State = network["model"] if network["average"] is None else network["average"]
    return current if network["best"] is None else network["best"]


@dataclass(frozen=True)
class Checkpoint:
    """A training at the end of an epoch: everything the next epoch depends on."""

    config: dict[str, Any]
    """TrainConfig.to_dict(), so that another configuration is refused."""
    metrics: list[dict[str, float]]
    """Metrics of each epoch so far; their number is the current epoch."""
    best_epoch: int
    """From 1."""
    micro_batch: int
    """Images computed at once."""
    model: State
    best: State | None
    """Weights of the best epoch; None if they are the current ones: the EMA `average` if enabled,
    otherwise `model`."""
    optimizer: dict[str, Any]
    average: State | None = None
    """Exponential moving average of the weights, if enabled."""
    averaged: int = 0
    """Updates of the average so far."""
    predictions: State = field(default_factory=dict)
    """On the validation images in the best epoch (see `hpo.training.tasks.Validated`); empty in a
    checkpoint of an hpo before."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """The six fields above for the network of each further fold of a cross-validation."""

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.metrics)

    @property
    def networks(self) -> list[dict[str, Any]]:
        """The fields PER_NETWORK of each network."""
        return [{name: getattr(self, name) for name in PER_NETWORK}, *self.others]

    @property
    def best_states(self) -> list[State]:
        """Weights of the best epoch, one state dict per network."""
        return [best_of(network) for network in self.networks]

    @property
    def best_weights(self) -> State:
        """Weights of the best epoch as one state dict; with several folds, each name is prefixed
        with `fold0.`, `fold1.`, ..."""
        states = self.best_states
        if len(states) == 1:
            return states[0]
        return {
            f"fold{i}.{name}": value
            for i, state in enumerate(states)
            for name, value in state.items()
        }

    def save(self, path: Path) -> None:
        """Write the checkpoint to `path`, atomically. Raises DiskFull."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        # A file of ours: in one that torch opens itself, a full disk is an error without a cause.
        atomic_write(path, lambda file: torch.save(fields, file), sealed=True)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint. Raises Damaged if the file is missing, incomplete or altered."""
        if not path.exists():
            raise Damaged(f"checkpoint {path} is not on this host; share the run directory")
        try:
            damage = find_damage(path)
            if damage is not None:
                raise Damaged(f"checkpoint {path}: damaged: {damage}")
            return cls(**safe_load(path))
        except OSError as error:
            raise Damaged(f"checkpoint {path}: cannot be read: {error}") from error
        except (DataError, TypeError) as error:
            raise Damaged(f"checkpoint {error}") from error

    def require(self, config: TrainConfig) -> None:
        """Raise Damaged unless this is a checkpoint of `config`, or of the same training with
        another number of epochs where its epochs do not depend on that."""
        free = FREE if config.tied_to_length else (*FREE, "epochs")
        before = {f"runtime.{name}": value for name, value in BEFORE.items()}
        mine, theirs = {**before, **flatten(self.config)}, flatten(config.to_dict())
        differing = [
            f"{key} = {mine.get(key)} instead of {theirs.get(key)}"
            for key in sorted(mine.keys() | theirs.keys())
            if key not in free and mine.get(key) != theirs.get(key)
        ]
        if differing:
            raise Damaged(f"checkpoint of another configuration: {'; '.join(differing)}")


def best_weights(checkpoint: Path) -> State:
    """Return the weights of the best epoch, on the CPU (see `Checkpoint.best_weights`)."""
    return Checkpoint.load(checkpoint).best_weights


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict as safetensors with `metadata` in its header. Raises DiskFull."""
    # A copy of each: safetensors refuses tensors that share their memory, as tied weights do.
    plain = {name: _copied(tensor) for name, tensor in state.items()}
    content = with_checksum(safetensors.torch.save(plain, {**metadata, **blank()}))
    atomic_write(path, lambda file: file.write(content))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def load_trained(path: Path, config: ModelConfig, *, classes: int, image_size: int) -> nn.Module:
    """Return the network of `config` in eval mode with weights that `save_weights` wrote.

    Raises DataError if the file is missing, damaged, or belongs to another network.
    """
    if path.is_file() and (damage := find_damage(path)):
        raise DataError(
            f"{path} is damaged ({damage}): restore it, or train into another folder (hpo train -o)"
        )
    model = models.build(config, classes=classes, image_size=image_size, pretrained=False)
    try:
        model.load_state_dict(pretrained.read_file(path))
    except RuntimeError as error:
        raise DataError(f"{path} does not hold this network: {error}") from error
    return model.eval()
