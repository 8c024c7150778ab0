"""Random changes of training images, a batch at a time, with an explicit generator.

All parameters of an epoch are drawn beforehand, on the CPU, from (seed, epoch, purpose): they are
the same on every device, and one augmentation does not shift the parameters of another. The order
is fixed: crop, flips, policy, one resampling by a matrix per image, colour, erasing, mixing.
"""

from hpo.training.augment.ops import centre, erase, generator
from hpo.training.augment.params import AugmentParams, apply_float, apply_uint8, draw_params

__all__ = [
    "AugmentParams",
    "apply_float",
    "apply_uint8",
    "centre",
    "draw_params",
    "erase",
    "generator",
]
