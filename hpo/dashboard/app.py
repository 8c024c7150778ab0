"""optuna-dashboard over a database of hpo's: the app behind the gateway.

Its caches go by the ids of studies and trials. Tables that hpo made never give out an id twice;
those of others do on SQLite, once the newest study is deleted. So every request reads which study
an id belongs to, and if that has changed, optuna-dashboard is made anew, with empty caches.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.wrappers import Response

from hpo.dashboard.feed import Feed
from hpo.dashboard.gateway import Request, json_response, refusal
from hpo.dashboard.pages import Pages
from hpo.errors import InputError, StorageError
from hpo.paths import Home
from hpo.search import study as studies
from hpo.storage import records
from hpo.storage.database import Database
from hpo.storage.optuna import FencedStorage, cached
from hpo.storage.schema import create_schema

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

STUDY = re.compile(r"/api/studies/(\d+)")
HEALTH_S = 2.0


class DashboardApp:
    """The WSGI app of `database`, whose tables are created if they are missing: hpo's own pages at
    /hpo, optuna-dashboard everywhere else."""

    def __init__(self, database: Database, *, read_only: bool = False) -> None:
        create_schema(database)
        self.database = database
        self._pages = Pages(database, read_only)
        self._feed = Feed(database)
        self._lock = threading.Lock()
        self._identities = records.study_identities(database)
        self._app = _optuna_dashboard(database)

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer a request that the gateway let through."""
        return self._respond(Request(environ))(environ, start)

    def _respond(self, request: Request) -> Response:
        if request.path == "/hpo" or request.path.startswith("/hpo/"):
            return self._pages.respond(request)
        if not request.path.startswith(("/api/", "/csv/")):
            return Response.from_app(self._app, request.environ)
        app = self._current()
        match = STUDY.fullmatch(request.path)
        if request.method == "DELETE" and match is not None:
            response = self._delete(int(match[1]))
            if response is not None:
                return response
        response = Response.from_app(app, request.environ)
        if request.method == "GET" and match is not None and response.status_code == 200:
            detail = json.loads(response.get_data())
            self._feed.add(int(match[1]), detail)
            response.set_data(json.dumps(detail, separators=(",", ":")))
        # The pages read JSON out of every response, and take one without for a failure.
        return json_response(200, {}) if response.status_code == 204 else response

    def _delete(self, study_id: int) -> Response | None:
        """Delete as `hpo delete` does, files included; return None if the study is not hpo's."""
        rows = records.list_studies(self.database)
        name = next((row.name for row in rows if row.study_id == study_id), None)
        if name is None:
            return None
        try:
            studies.delete(studies.load(self.database, name), Home.default())
        except InputError as error:
            return refusal(409, str(error))
        return json_response(200, {})

    def _current(self) -> WSGIApplication:
        """Return the app, made anew if an id that it knows now belongs to another study, or to
        none."""
        current = records.study_identities(self.database)
        with self._lock:
            if any(current.get(key) != known for key, known in self._identities.items()):
                self._app = _optuna_dashboard(self.database)
            self._identities = current
            return self._app


def _optuna_dashboard(database: Database) -> WSGIApplication:
    import optuna_dashboard
    from optuna_dashboard import _importance

    _importance.param_importance_cache.clear()  # a module's, by the same ids
    app: WSGIApplication = optuna_dashboard.wsgi(cached(FencedStorage(database)))
    return app


class Health:
    """Whether the database answers. One thread at a time asks it, every HEALTH_S at most, so that
    requests of strangers cost nothing and a database that hangs blocks one thread alone."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._lock = threading.Lock()
        self._healthy, self._asked = True, -HEALTH_S

    def __call__(self) -> bool:
        """Return whether the database answered when it was last asked."""
        if not self._lock.acquire(blocking=False):
            return self._healthy and time.monotonic() - self._asked < HEALTH_S
        try:
            if time.monotonic() - self._asked >= HEALTH_S:
                self._asked = time.monotonic()
                self._healthy = self._ask()
        finally:
            self._lock.release()
        return self._healthy

    def _ask(self) -> bool:
        try:
            records.clock(self.database)
        except StorageError:
            return False
        return True
