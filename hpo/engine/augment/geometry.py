"""Changes of shape as matrices, which compose into one resampling.

A matrix, (B, 3, 3), takes homogeneous (x, y, 1) of the result to the picture, both in -1..1 with
the centre at 0. What happens to the picture first stands first in a product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation(degrees: Tensor) -> Tensor:
    """(B, 3, 3) matrices that turn pictures counter-clockwise about their centre."""
    angle = torch.deg2rad(degrees.double())
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix([cos, -sin, zero, sin, cos, zero, zero, zero, one])


def affine(shift: Tensor, scale: Tensor, shear: Tensor, size: int) -> Tensor:
    """(B, 3, 3) matrices of torchvision's affine without a turn: shear by (B,) degrees along the
    horizontal, enlarge by (B,) factors, then move by (B, 2) pixels of `size`, right and down."""
    slope, inverse = torch.deg2rad(shear.double()).tan(), 1 / scale.double()
    right, down = (shift.double() * (2 / size)).unbind(1)
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    across = -inverse * (right + slope * down)
    return _matrix(
        [inverse, slope * inverse, across, zero, inverse, -inverse * down, zero, zero, one]
    )


def perspective(corners: Tensor, size: int) -> Tensor:
    """(B, 3, 3) matrices of torchvision's perspective: the centres of the corner pixels of pictures
    of `size` move to `corners`, (B, 4, 2) x and y in pixels: top left, top right, bottom right,
    bottom left, no three of them on a line."""
    start = corner_pixels(size).expand_as(corners)
    x, y = corners.double().unbind(2)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows = []
    for axis, target in enumerate(start.unbind(2)):
        line = [zero] * 6
        line[3 * axis : 3 * axis + 3] = [x, y, one]
        rows.append(torch.stack([*line, -x * target, -y * target], 2))
    solved = torch.linalg.solve(torch.cat(rows, 1), start.mT.flatten(1))
    pixels = torch.cat([solved, torch.ones_like(solved[:, :1])], 1).view(-1, 3, 3)
    to_unit = torch.tensor([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]], dtype=torch.float64)
    return (to_unit @ pixels @ to_unit.inverse()).float()


def corner_pixels(size: int) -> Tensor:
    """(4, 2) x and y of the corner pixels, clockwise from the top left."""
    end = size - 1
    return torch.tensor([[0, 0], [end, 0], [end, end], [0, end]], dtype=torch.float64)


def warp(batch: Tensor, matrix: Tensor) -> Tensor:
    """Resample square pictures (B, C, S, S) once, bilinearly, black outside.

    `matrix` is (B, 3, 3), or (B, 2, 3) where the last row is 0, 0, 1: that is quicker.
    """
    grid = _places(matrix, batch.shape[2])
    if matrix.shape[1] == 3:
        grid = grid[..., :2] / grid[..., 2:]
    return F.grid_sample(batch, grid, "bilinear", "zeros", align_corners=False)


def _places(matrix: Tensor, size: int) -> Tensor:
    """(B, S, S, R) products of (B, R, 3) matrices with the centre (x, y, 1) of each pixel: a sum of
    a row and a column, and so far quicker than a product for each."""
    centres = torch.arange(1 - size, size, 2, device=matrix.device) / size
    across = (matrix[:, :, 0, None] * centres).mT
    down = (matrix[:, :, 1, None] * centres + matrix[:, :, 2, None]).mT
    return across[:, None] + down[:, :, None]


def _matrix(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows, 1).view(-1, 3, 3).float()
