"""Phases of one training, such as the head alone first and some blocks after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, WrapValidator

from hpo.definition.fields import Part, or_none
from hpo.definition.model import Blocks


class PhaseConfig(Part):
    """A stretch of epochs with its own trainable blocks and learning rate. The optimizer starts
    anew with it, and the schedule runs from its start to its end."""

    epochs: int = Field(ge=1, le=10_000)
    """Epochs of this phase; has no default."""
    trainable_blocks: Annotated[Blocks, WrapValidator(or_none)] = None
    """As model.trainable_blocks, which is the default."""
    lr: float | None = Field(default=None, gt=0, le=100)
    """Largest learning rate of this phase; default: optimizer.lr."""


@dataclass(frozen=True)
class Phase:
    """A phase with nothing left open; a training without phases is one."""

    number: int
    """From 0."""
    start: int
    """Epochs before it."""
    epochs: int
    trainable_blocks: Any
    lr: float
