"""Launchers of workers: they start N of them, list them, end them, read their logs.

    local.py   in the background of this host
    ray.py     on the nodes of a Ray cluster, as detached actors
    slurm.py   on the nodes of a Slurm cluster, as an array job

A launcher only places. Who runs which trial is settled in the database, by leases: whatever a
launcher does twice, late or not at all, the budget stays exact. What it places is an agent
(`hpo.workers.agent`), and `hpo stop` reaches all of them through the database alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from hpo.errors import InputError, nearest
from hpo.paths import Home
from hpo.workers.launchers.base import Launcher

NAMES = ("local", "slurm", "ray", "ray://HOST:PORT")


def open_launcher(
    on: str, home: Home, *, insecure: bool = False, sbatch: Sequence[str] = ()
) -> AbstractContextManager[Launcher]:
    """Open the launcher that `--on` names. Raises InputError for another name, or for options of
    another launcher; LauncherError where it cannot be reached."""
    kind = "ray" if on.startswith("ray://") else on
    if kind not in NAMES:
        raise InputError(f"--on {on}: no such launcher; {nearest(on, NAMES)}")
    if insecure and kind != "ray":
        raise InputError(f"--insecure is about Ray clusters; it says nothing about --on {on}")
    if sbatch and kind != "slurm":
        raise InputError(f"--sbatch is for --on slurm; it says nothing about --on {on}")
    if kind == "ray":
        from hpo.workers.launchers.ray import connected

        return connected(on, insecure=insecure)
    if kind == "slurm":
        from hpo.workers.launchers.slurm import Slurm

        return nullcontext(Slurm(home, sbatch))
    from hpo.workers.launchers.local import Local

    return nullcontext(Local(home))
