"""Workers on a Ray cluster: a detached actor each, which Ray places, and moves when a node dies.

The actor is a keeper, with the worker as its child process. A torch that crashes or runs out of
memory takes no Ray process with it; the worker can be asked to hand back (Ray knows no SIGTERM) and
has a log of its own. Ray re-runs only `__init__` of an actor that it restarts, so that is where the
keeper starts. Ray declares a node dead after a silence (about a minute by default) and starts its
actors elsewhere; what still runs there meanwhile is kept apart by the leases.

The database's URL travels as an argument of the actor. Environment variables of an actor are shown
by Ray's state API, arguments are not; whoever may call the cluster at all, may run code there.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import EngineError, HpoError, InputError
from hpo.extras import install_command
from hpo.workers.engines import Order, Placed, Size, Target
from hpo.workers.keeper import Duty, Keeper, logs_after

log = logging.getLogger(__name__)

NAMESPACE = "hpo"
ANSWER_S = 5.0
"""How long an actor may take to answer; one that waits for a place never does."""
PLACING_S = 30.0
"""How long `start` waits for the first word of its actors: one that cannot begin says why."""


class KeeperActor:
    """A keeper in a process of Ray's; `name` is the actor's."""

    def __init__(self, name: str, duty: Duty, folder: str) -> None:
        self.name, self.keeper, self.stop = name, Keeper(duty), threading.Event()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        if Path(folder).is_dir():
            os.chdir(folder)  # where relative paths and modules of one's own are looked for
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()

    def _keep(self) -> None:
        try:
            self.keeper.run(self.stop)
        except HpoError:
            pass  # said where `hpo workers` shows it
        except Exception:
            log.exception("the keeper failed")
        import ray

        ray.kill(ray.get_actor(self.name, namespace=NAMESPACE), no_restart=True)

    def leave(self) -> None:
        """Hand back and end."""
        self.stop.set()

    def about(self) -> dict[str, str]:
        """State, place and workers."""
        import ray

        working = self.keeper.running
        state = "ending" if self.stop.is_set() else "running" if working else "starting"
        address = ray.util.get_node_ip_address()
        note = ", ".join(working) or self.keeper.note
        return {"state": state, "host": f"{socket.gethostname()} ({address})", "note": note}

    def logs(self, seen: Mapping[str, int]) -> dict[str, bytes]:
        """Of the workers of this actor."""
        return logs_after(self.keeper.duty.directory, seen, self.keeper.started)


@dataclass
class RayEngine:
    """A Ray cluster that we are connected to."""

    ray: Any
    has_our_files: bool = False

    def check(self, size: Size) -> None:
        check_room(self._nodes(), self._filled(size))

    def start(self, order: Order) -> None:
        target, size = order.target, self._filled(order.size)
        device, cpus = "cuda:0" if size.gpus else "cpu", size.cpus or 1
        duty = Duty(target.study, target.uuid, order.storage, order.home, [device], cpus)
        actor = self.ray.remote(KeeperActor)
        settings = {
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "num_cpus": cpus,
            "num_gpus": size.gpus,
            "scheduling_strategy": "SPREAD",
        }
        names = [f"{target.label}-{secrets.token_hex(3)}" for _ in range(size.workers)]
        folder = str(Path.cwd())
        try:
            self._await_birth(
                [actor.options(name=n, **settings).remote(n, duty, folder) for n in names]
            )
        except Exception as error:
            for name in names:
                self._kill(name)
            raise EngineError(_words(error)) from None

    def _nodes(self) -> list[Mapping[str, float]]:
        """The resources of each node by Ray's names, CPU and GPU above all."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _filled(self, size: Size) -> Size:
        """The size with what this cluster finds right where it left something open."""
        gpus = size.gpus
        if gpus is None:
            gpus = float(any(node.get("GPU") for node in self._nodes()))
        return Size(size.workers, gpus, size.cpus or 1)

    def _await_birth(self, actors: Sequence[Any]) -> None:
        """Raise the error of an actor that could not begin; those that wait for a place may."""
        asked = [actor.about.remote() for actor in actors]
        ready, _ = self.ray.wait(asked, num_returns=len(asked), timeout=PLACING_S)
        self.ray.get(ready)

    def placed(self, target: Target) -> list[Placed]:
        answers = self._ask(target, "about")
        waiting = {"state": "waiting", "host": "", "note": "for a place, or for its node's answer"}
        return [Placed(name, **(answer or waiting)) for name, answer in answers.items()]

    def stop(self, target: Target) -> None:
        for name, answer in self._ask(target, "about").items():
            if answer is None:
                self._kill(name)
            else:
                with suppress(Exception):
                    self.ray.get_actor(name, namespace=NAMESPACE).leave.remote()

    def logs(self, target: Target, seen: Mapping[str, int]) -> dict[str, bytes]:
        answers = self._ask(target, "logs", dict(seen))
        return {worker: text for part in answers.values() for worker, text in (part or {}).items()}

    def _ask(self, target: Target, method: str, *args: Any) -> dict[str, Any]:
        """What each actor of the study answers, by name; None from one that does not."""
        names = [name for name in self.ray.util.list_named_actors()
                 if name.startswith(f"{target.label}-")]  # fmt: skip
        asked = {}
        for name in sorted(names):
            with suppress(ValueError):  # it has ended since
                actor = self.ray.get_actor(name, namespace=NAMESPACE)
                asked[name] = getattr(actor, method).remote(*args)
        answers: dict[str, Any] = dict.fromkeys(asked)
        if asked:
            self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        for name, reference in asked.items():
            with suppress(self.ray.exceptions.RayError):  # it waits, is restarting, or has ended
                answers[name] = self.ray.get(reference, timeout=0)
        return answers

    def _kill(self, name: str) -> None:
        with suppress(Exception):
            self.ray.kill(self.ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def check_room(nodes: Sequence[Mapping[str, float]], size: Size) -> None:
    """Raise InputError where so many workers never fit on nodes of these resources, busy or not."""
    cpus, gpus, room = size.cpus or 1, size.gpus or 0.0, 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // cpus)
        room += min(by_cpu, int(node.get("GPU", 0)) * size.per_gpu) if gpus else by_cpu
    if size.workers > room:
        have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        raise InputError(
            f"--workers {size.workers} with {cpus} CPU and {gpus:g} GPU each: the Ray cluster has "
            f"{len(nodes)} nodes with {have['CPU']:g} CPU and {have['GPU']:g} GPU, room for "
            f"{room}; give fewer --workers, or less --gpus-per-worker or --cpus-per-worker"
        )


def _words(error: Exception) -> str:
    """What a user can do about a keeper that could not begin."""
    text = str(error)
    missing = re.search(r"No module named '[\w.]+'", text)
    if missing:
        return (
            f"a node of the Ray cluster cannot begin: {missing[0]}; every node needs hpo, in the "
            "Python that Ray runs there, and the images at the same path; here: "
            f"{install_command('ray')}"
        )
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"Ray could not place the workers: {lines[-1].strip() if lines else error!r}"
