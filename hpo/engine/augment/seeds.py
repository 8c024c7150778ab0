"""Where all that is random in an epoch comes from."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, epoch: int, purpose: str) -> int:
    """A number of 63 bits that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, purpose))
