"""Random changes of training pictures, a batch at a time, with an explicit generator.

All draws of an epoch are made beforehand, on the CPU, from (seed, epoch, what is drawn): they are
the same on every device, and one augmentation does not shift the draws of another. The order is
fixed: crop, flips, policy, one resampling by a matrix per picture, colour, erasing, mixing.
"""

from hpo.training.augment.ops import (
    centre,
    erase,
    generator,
)
from hpo.training.augment.params import (
    Draws,
    apply,
    draw,
    prepare,
)

__all__ = ["Draws", "apply", "centre", "draw", "erase", "generator", "prepare"]
