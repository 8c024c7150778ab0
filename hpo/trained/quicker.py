"""What would make a search quicker: changes that apply to it, with measured factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hpo.config.study import StudyFile
from hpo.config.train import TrainConfig
from hpo.errors import HpoError
from hpo.training import device as runtime

LONG_S = 600.0
"""A search that may take longer is shown what would be quicker."""
LIMITS_S = tuple(60.0 * one for one in (5, 10, 20, 30, 60, 120, 240, 480, 1_440))
WORTH = 0.75
"""Largest part of the time that makes a change worth a word."""
SMALLEST = 64
"""Smallest image size that is proposed."""
BLOCKS = 2
"""Trainable blocks that are proposed for pretrained weights."""
FEWEST_EPOCHS = 4


def faster(
    file: StudyFile, config: TrainConfig, classes: int, device: torch.device
) -> Iterator[str]:
    """Yield changes of what is not searched, each with the part of the time that is left: by fewer
    epochs, and by measured steps of `config` on smaller images and with frozen blocks."""
    if "epochs" not in file.space and not config.phases and config.epochs >= FEWEST_EPOCHS:
        yield f"epochs = {config.epochs // 2} ({part(config.epochs // 2 / config.epochs)})"
    before = _step_s(config, classes, device)
    for name, changed in _changed(file, config):
        after = _step_s(changed, classes, device)
        if before and after and after / before <= WORTH:
            yield f"{name} (about {part(after / before)})"


def _changed(file: StudyFile, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield configurations that differ from `config` in one setting, which is named."""
    size = int(config.data.image_size * 0.7) // 32 * 32
    resized = any(one.startswith(("data.image_size", "data.resize")) for one in file.space)
    if size >= SMALLEST and not resized:
        data = config.data.model_copy(update={"image_size": size})
        yield f"data.image_size = {size}", config.model_copy(update={"data": data})
    frozen = any(one.endswith("trainable_blocks") for one in file.space) or config.phases
    if config.model.weights is not None and not frozen and config.model.trainable_blocks == "all":
        model = config.model.model_copy(update={"trainable_blocks": BLOCKS})
        changed = config.model_copy(update={"model": model})
        yield f"model.trainable_blocks = {BLOCKS}", changed


def _step_s(config: TrainConfig, classes: int, device: torch.device) -> float | None:
    """Return the seconds of a step; None where it cannot be taken."""
    try:
        return runtime.measure_step(config, classes=classes, device=device).seconds
    except (HpoError, torch.OutOfMemoryError):
        return None


def part(ratio: float) -> str:
    """Return a part as a fraction: 1/2, 2/3, 1/8."""
    if ratio > 0.58:
        return "2/3"
    return f"1/{max(2, round(1 / ratio))}"


def limit_for(seconds: float) -> float:
    """Return a limit of time below what a search is expected to take."""
    return max([one for one in LIMITS_S if one <= seconds / 2], default=LIMITS_S[0])
