"""Every error that hpo raises on purpose.

    HpoError                     1   something went wrong; the message says what and what next
    ├── InputError               2   what the user gave cannot be used; nothing was created
    │   ├── ConfigError              a field of a study file or configuration
    │   ├── DataError                images: missing, unreadable, too few, a leaking class
    │   ├── NotFound                 no such study, trial, run or worker
    │   └── Conflict                 a study of that name exists with another definition
    │       └── LimitsRaised             it differs in higher limits alone: extend it
    ├── StorageError             2   the database is not one of ours, or cannot be used
    │   ├── StorageUnavailable  75       it cannot be reached or written for now: try again later
    │   └── StorageGone              its file was removed, moved or replaced while it was in use
    ├── LauncherError            2   what places workers cannot be reached, or refuses
    ├── DiskFull                 1   a file does not fit on its disk; what was there is as it was
    ├── Damaged                  1   a checkpoint is not what was written; training goes back
    ├── TrialFailed              1   one trial cannot be trained; the study continues
    ├── Fenced                   1   this worker no longer owns its trial: drop it, continue
    └── Interrupted            130   stopped by a signal, work handed back

The number is the exit code of `hpo`. A message says the value, what is allowed, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LONGEST_KEY = 120
"""Characters of a field's name that a message shows; ours have 40."""


class HpoError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class InputError(HpoError):
    """What the user gave cannot be used; nothing was created."""

    exit_code = 2


class ConfigError(InputError):
    """A field of a study file or configuration is wrong.

    `where` is the file, `key` the dotted path of the field; either may be empty.
    """

    def __init__(self, message: str, *, key: str = "", where: str = "") -> None:
        self.message, self.key, self.where = message, key, where
        short = key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}..."
        super().__init__(": ".join(part for part in (where, short, message) if part))

    def at(self, where: str) -> ConfigError:
        """Return the same error, naming the file `where` unless it names one already."""
        return ConfigError(self.message, key=self.key, where=self.where or where)


class DataError(InputError):
    """Images are missing, unreadable or too few, or a class is where it must not be."""


class NotFound(InputError):
    """No study, trial, run or worker of that name."""


class Conflict(InputError):
    """A study of that name exists with another definition."""


class LimitsRaised(Conflict):
    """A study of that name exists, and has lower limits: `limits` are what to extend it with, by
    their names in [study]."""

    def __init__(self, message: str, limits: Mapping[str, Any]) -> None:
        self.limits = dict(limits)
        super().__init__(message)


class StorageError(HpoError):
    """The database is not one of ours, or cannot be used as it was named."""

    exit_code = 2


class StorageUnavailable(StorageError):
    """The database cannot be reached or written for now: it is down or restarting, locked for too
    long, or its disk is full. Nothing is wrong with what was asked, so it may be asked again."""

    exit_code = 75  # sysexits.h: EX_TEMPFAIL


class StorageGone(StorageError):
    """The database's file was removed or replaced: whatever began on it ends, and writes nothing
    more."""


class DiskFull(HpoError):
    """A file does not fit on its disk; what was there is as it was. It may be tried again once
    `needed` bytes are free where `path` lies (0: it is not known how many)."""

    def __init__(self, message: str, *, path: Path, needed: int = 0) -> None:
        self.path, self.needed = path, needed
        super().__init__(message)


class Damaged(HpoError):
    """A checkpoint is not what was written there, or is gone: no result of its training, which goes
    back to an earlier one."""


class LauncherError(HpoError):
    """Ray, Slurm or whatever places workers cannot be reached, or does not take them."""

    exit_code = 2


class TrialFailed(HpoError):
    """This configuration cannot be trained; the study continues without it."""


class Fenced(HpoError):
    """Another worker owns the trial now: every write of ours is refused."""


class Interrupted(HpoError):
    """Stopped by a signal; the work was handed back."""

    exit_code = 130


def nearest(value: object, allowed: Iterable[str], *, most: int = 8) -> str:
    """Return the end of a message about an unknown name: the nearest valid ones, else a list."""
    names = list(allowed)
    close = difflib.get_close_matches(str(value), names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
    return f"allowed: {shown}"
