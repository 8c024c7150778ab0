"""A whole check: the database and the files, and what can be mended of it."""

from __future__ import annotations

from dataclasses import replace

from hpo.paths import Home
from hpo.search import damage, leftovers
from hpo.storage import checking
from hpo.storage.checking import Checked
from hpo.storage.db import Database
from hpo.storage.findings import Finding


def check_all(
    database: Database, home: Home, artifacts: str | None = None, *, files: bool = False
) -> Checked:
    """Changes nothing. `artifacts` is a store to look into, beside those of the studies; with
    `files` every file that bears a checksum is read through, too.

    Raises NotFound where there is no database of hpo's, StorageError where it cannot be read.
    """
    checking.require(database)
    checked = checking.check(database)
    if not checked.readable:
        return checked
    found = [*checked.found, *leftovers.look(database, home, artifacts)]
    if files:
        found += damage.look(database, home, artifacts)
    return replace(checked, found=tuple(found))


def mend(database: Database, checked: Checked) -> list[Finding]:
    """Mend what can be; those findings that were."""
    return [one for one in checked.found if one.cure is not None and one.cure.apply(database)]
