"""When something counts as hanging: pure, told the time by whoever looks."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_LOOK_S = 5.0
"""Of the time between two looks no more than this counts: whoever did not look for longer was
stopped, slept with the machine or waited itself, and cannot tell what others did meanwhile."""


@dataclass
class Watch:
    """How long the signs of life of somebody else have stopped changing.

    Signs are only compared with each other, and time is the watcher's own and monotonic: a clock
    that is set, and another host's clock in the time of a file, change nothing.
    """

    idle_s: float = 0.0
    sign: object = None
    looked: float | None = None

    def look(self, sign: object, now: float) -> float:
        """Seconds without a new sign, at `now` of a monotonic clock."""
        since = 0.0 if self.looked is None else now - self.looked
        self.looked = now
        if sign != self.sign:
            self.sign, self.idle_s = sign, 0.0
        else:
            self.idle_s += min(since, LONGEST_LOOK_S)
        return self.idle_s


def no_step(stall_timeout_s: float) -> str:
    """Why an attempt was ended, in words."""
    return f"made no step for {stall_timeout_s:g} s (study.stall_timeout_s)"
