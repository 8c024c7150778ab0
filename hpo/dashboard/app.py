"""optuna-dashboard over a database of ours: what stands behind the door.

Its caches go by the ids of studies and trials. Tables that hpo made never give an id out twice;
those of others do on SQLite, once the newest study is deleted. So every request looks which study
an id is, and where that has changed optuna-dashboard is made anew, with nothing in memory.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hpo.dashboard import gateway
from hpo.dashboard.gateway import (
    Answer,
    Request,
    refusal,
)
from hpo.errors import (
    InputError,
    StorageError,
)
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.optuna import (
    FencedStorage,
    cached,
    create_schema,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

STUDY = re.compile(r"/api/studies/(\d+)")
LOOK_S = 2.0


class House:
    """The WSGI app of `database`, whose tables are made if they are missing."""

    def __init__(self, database: Database) -> None:
        create_schema(database)
        self.database = database
        self._lock = threading.Lock()
        self._known = records.study_identities(database)
        self._app = _optuna_dashboard(database)

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        request = Request.of(environ)
        answer = self._answer(request, environ)
        start(answer.status_line, answer.headers)
        return answer.body

    def _answer(self, request: Request, environ: WSGIEnvironment) -> Answer:
        if not request.path.startswith(("/api/", "/csv/")):
            return gateway.ask(self._app, environ)
        app = self._current()
        named = STUDY.fullmatch(request.path)
        if request.method == "DELETE" and named is not None:
            done = self._deleted(int(named[1]))
            if done is not None:
                return done
        answer = gateway.ask(app, environ)
        # The pages read JSON out of every answer, and take one without for a failure.
        return gateway.from_json(200, {}) if answer.status == 204 else answer

    def _deleted(self, study_id: int) -> Answer | None:
        """Delete as `hpo delete` does, files included; None where the study is not ours."""
        rows = records.list_studies(self.database)
        name = next((row.name for row in rows if row.study_id == study_id), None)
        if name is None:
            return None
        try:
            studies.delete(studies.load(self.database, name), Home.default())
        except InputError as error:
            return refusal(409, str(error))
        return gateway.from_json(200, {})

    def _current(self) -> WSGIApplication:
        """The app, made anew if an id that it knows is another study's by now, or nobody's."""
        seen = records.study_identities(self.database)
        with self._lock:
            if any(seen.get(key) != known for key, known in self._known.items()):
                self._app = _optuna_dashboard(self.database)
            self._known = seen
            return self._app


def _optuna_dashboard(database: Database) -> WSGIApplication:
    import optuna_dashboard
    from optuna_dashboard import _importance

    _importance.param_importance_cache.clear()  # a module's, by the same ids
    app: WSGIApplication = optuna_dashboard.wsgi(cached(FencedStorage(database)))
    return app


class Health:
    """Whether the database answers: asked at most every LOOK_S, by one thread at a time, so that
    questions of strangers cost nothing and a database that hangs holds up one thread alone."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = threading.Lock()
        self._well, self._began = True, -LOOK_S

    def __call__(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return self._well and time.monotonic() - self._began < LOOK_S
        try:
            if time.monotonic() - self._began >= LOOK_S:
                self._began = time.monotonic()
                self._well = self._look()
        finally:
            self._lock.release()
        return self._well

    def _look(self) -> bool:
        try:
            records.clock(self.database)
        except StorageError:
            return False
        return True
