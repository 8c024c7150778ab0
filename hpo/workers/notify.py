"""Messages at the end of a search, and in trouble: a bell, a webhook, or a command."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hpo.errors import InputError
from hpo.formatting import number, plural
from hpo.redaction import keep_secret, redact
from hpo.search.status import StudyStatus
from hpo.storage.records import WORTHLESS, Outcome

log = logging.getLogger(__name__)

VARIABLE = "HPO_NOTIFY"
"""Environment variable with one more target: a command line is not secret."""
POST_S = 5.0
COMMAND_S = 30.0
"""Seconds after which a server or a command has failed to take a message."""
OUTAGE_S = 60.0
"""Seconds without a database after which that is told."""
HOPELESS = 5
"""Trials without a result after which that is told if there is no other."""

Message = Mapping[str, Any]
Target = Callable[[Message], None]


def ring(message: Message) -> None:
    """Ring the terminal's bell, if standard error is one."""
    if sys.stderr.isatty():
        sys.stderr.write("\a")
        sys.stderr.flush()


def webhook(url: str) -> Target:
    """Return what posts a message to `url` as JSON. Raises InputError for what is no such URL,
    which is never shown: whoever knows it can post."""
    keep_secret(url)
    host = _host(url)

    def post(message: Message) -> None:
        from http.client import HTTPException
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class Stay(HTTPRedirectHandler):
            """A redirect is an error: what follows it is a GET, without the message."""

            def redirect_request(self, *_: Any) -> None:
                return None

        body = json.dumps({**message, "content": message["text"]}).encode()
        head = {"Content-Type": "application/json", "User-Agent": "hpo"}
        try:
            with build_opener(Stay).open(Request(url, body, head), timeout=POST_S):
                pass
        except (OSError, HTTPException, ValueError) as error:
            log.warning("--notify: %s did not take the message: %s", host, redact(str(error)))

    return post


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    is_web = host is not None and parts.scheme.lower() in ("http", "https")
    if not host or not is_web or not url.isprintable() or " " in url or parts.username is not None:
        raise InputError(
            "--notify: not a URL that can be posted to: allowed is http(s)://HOST/PATH, without a "
            "user"
        )
    return host


def command(line: str) -> Target:
    """Return what runs a command with the message in its environment and, as JSON, on its standard
    input; no shell reads either. Raises InputError if there is no such program."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"--notify: not a command: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            f"--notify {words[0] if words else line!r}: allowed are bell, the URL of a webhook, and"
            " a command; there is no such program"
        )

    def run(message: Message) -> None:
        best = message["best"] or {}
        told = {"HPO_STUDY": message["study"], "HPO_STATE": message["state"],
                "HPO_TEXT": message["text"], "HPO_BEST": str(best.get("value", ""))}  # fmt: skip
        text = json.dumps(message).encode()
        try:
            ended = subprocess.run(words, input=text, env=os.environ | told, timeout=COMMAND_S,
                                   capture_output=True, check=False)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error) if isinstance(error, OSError) else f"no end after {COMMAND_S:g} s"
            log.warning("--notify %s: %s", words[0], why)
        else:
            if ended.returncode:
                log.warning("--notify %s: exit code %d", words[0], ended.returncode)

    return run


def target(text: str) -> Target:
    """Return the target of a text: bell, a URL, or else a command. Raises InputError."""
    if text == "bell":
        return ring
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return webhook(text) if "://" in first else command(text)


class Notifier:
    """Tells its targets what becomes of a search, each in a thread of its own.

    `look` may be called at any pace; what it tells of trouble, it tells once.
    """

    def __init__(
        self, targets: Sequence[Target], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.targets, self.clock = targets, clock
        self.threads: list[threading.Thread] = []
        self.away_since: float | None = None
        self.told: set[str] = set()

    @classmethod
    def of(cls, texts: Sequence[str]) -> Notifier:
        """Return one for the values of --notify and VARIABLE. Raises InputError."""
        more = os.environ.get(VARIABLE)
        return cls([target(text) for text in [*texts, *([more] if more else [])]])

    def look(self, status: StudyStatus, problem: str) -> None:
        """Tell of trouble: `problem` says why the database cannot be read, for how long it may."""
        if not problem:
            self.away_since = None
            self.told.discard("storage")
        elif self.away_since is None:
            self.away_since = self.clock()
        elif self.clock() - self.away_since > OUTAGE_S and "storage" not in self.told:
            self.told.add("storage")
            self.tell(status, "trouble", "the database cannot be reached")
        lost = status.count(Outcome.FAILED, *WORTHLESS)
        if "trials" not in self.told and lost >= HOPELESS and lost == status.finished:
            self.told.add("trials")
            self.tell(status, "trouble", f"none of {plural(lost, 'trial')} has a result")

    def ended(self, status: StudyStatus, *, interrupted: bool) -> None:
        """Tell that a search has ended, and with what."""
        self.tell(status, "stopped" if interrupted else status.state, status.no_best or "")

    def failed(self, status: StudyStatus, error: Exception) -> None:
        """Tell that a search ended with an error."""
        first = (str(error).splitlines() or [type(error).__name__])[0]
        self.tell(status, "failed", redact(first))

    def tell(self, status: StudyStatus, state: str, why: str) -> None:
        """Send a message to all targets."""
        for one in self.targets:
            thread = threading.Thread(target=one, args=[message_of(status, state, why)])
            thread.daemon = True
            thread.start()
            self.threads.append(thread)

    def close(self) -> None:
        """Wait until all messages are sent, or could not be."""
        for thread in self.threads:
            thread.join(COMMAND_S + POST_S)


def message_of(status: StudyStatus, state: str, why: str) -> dict[str, Any]:
    """Return what is told of a study: names and figures, nothing about where it is stored."""
    best, name, metric = status.best, status.row.name, status.file.metric
    parts = [why] if why else []
    if best is not None:
        parts.append(f"best {metric} {number(best.value)} (trial {best.number})")
    of = "" if status.budget is None else f" of {status.budget:,}"
    parts.append(f"{status.finished:,}{of} trials finished")
    return {
        "study": name,
        "state": state,
        "finished": status.finished,
        "budget": status.budget,
        "best": None if best is None else {"trial": best.number, "metric": metric,
                                           "value": best.value, "params": best.params},
        "text": f"{name}: {state}: {'; '.join(parts)}",
    }  # fmt: skip
