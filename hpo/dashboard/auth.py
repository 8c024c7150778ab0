"""Who may come in: passwords and tokens, sessions, and the login throttle.

Both come from files or from the environment, never from the command line, where every user of the
machine sees it.

A client has FREE wrong ones, then waits 1, 2, 4, ... seconds. All clients together have a budget
that fills up again slowly, against guesses from many addresses; while it is spent, nobody new gets
in by password. Sessions and the token go on.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import stat
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import InputError

PASSWORD_FILE = "HPO_DASHBOARD_PASSWORD_FILE"
TOKEN_FILE = "HPO_DASHBOARD_TOKEN_FILE"
PASSWORD = "HPO_DASHBOARD_PASSWORD"
TOKEN = "HPO_DASHBOARD_TOKEN"

LEAST_PASSWORD = 8
LEAST_TOKEN = 20
"""Tokens are not guessed slowly as passwords are, so they have to be long."""
LONGEST_FILE = 4096  # bytes
CONTAINER_SECRETS = Path("/run/secrets")
"""Where containers find their secrets, readable by all users of a container that has one."""


@dataclass(frozen=True)
class Credentials:
    """Keyed hashes of the password and of the token; without either nobody is asked."""

    password: bytes | None = None
    token: bytes | None = None
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @classmethod
    def of(cls, *, password: str | None = None, token: str | None = None) -> Credentials:
        """Raises InputError for a password or token that is too short."""
        plain = cls()
        _check_length(password, "password", LEAST_PASSWORD)
        _check_length(token, "token", LEAST_TOKEN)
        return cls(
            None if password is None else plain._hash(password),
            None if token is None else plain._hash(token),
            plain.key,
        )

    @property
    def asked(self) -> bool:
        return self.password is not None or self.token is not None

    def is_password(self, given: str) -> bool:
        """Whether `given` is the password, or the token in its place; always as slow."""
        return self._is(given, self.password) | self._is(given, self.token)

    def is_token(self, given: str) -> bool:
        return self._is(given, self.token)

    def _is(self, given: str, wanted: bytes | None) -> bool:
        return hmac.compare_digest(self._hash(given), wanted or b"")

    def _hash(self, text: str) -> bytes:
        # One accented letter may be one code point or two, by keyboard.
        raw = unicodedata.normalize("NFC", text).encode(errors="surrogatepass")
        return hmac.digest(self.key, raw, hashlib.sha256)


def read_credentials(
    password_file: Path | None, token_file: Path | None, environment: Mapping[str, str]
) -> Credentials:
    """What stands in the files, or else in the variables PASSWORD and TOKEN. Raises InputError for
    a file that is missing, empty, or open to every user of the machine, and for what is too
    short."""
    password, token = environment.get(PASSWORD) or None, environment.get(TOKEN) or None
    if password_file is not None:
        password = _read(password_file, "password")
    if token_file is not None:
        token = _read(token_file, "token")
    return Credentials.of(password=password, token=token)


def from_environment(environment: Mapping[str, str]) -> Credentials:
    """`read_credentials` by the variables alone."""

    def path(name: str) -> Path | None:
        return Path(environment[name]) if environment.get(name) else None

    return read_credentials(path(PASSWORD_FILE), path(TOKEN_FILE), environment)


def _read(path: Path, what: str) -> str:
    """The one line of `path`."""
    where = f"{what} file {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}; write the {what} into it") from None
    private = not mode & (stat.S_IROTH | stat.S_IWOTH)
    if stat.S_ISREG(mode) and not private and not path.is_relative_to(CONTAINER_SECRETS):
        raise InputError(f"{where}: every user of this machine may open it; chmod 600 {path}")
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not text (UTF-8)") from None
    if len(raw) > LONGEST_FILE or len(lines) > 1:
        raise InputError(f"{where}: holds more than one line; write the {what} alone into it")
    if not lines or not lines[0].strip():
        raise InputError(f"{where}: is empty; write the {what} into it")
    return lines[0]


def _check_length(text: str | None, what: str, least: int) -> None:
    if text is not None and len(text) < least:
        raise InputError(
            f"the dashboard's {what} has {len(text)} characters; allowed: {least} and more, such "
            "as: python3 -c 'import secrets; print(secrets.token_urlsafe())'"
        )


FREE = 5
LONGEST_S = 300.0
FORGOTTEN_S = 3600.0
TOGETHER = 60
TOGETHER_S = 5.0  # until one of TOGETHER comes back
MOST = 10_000  # clients remembered


@dataclass
class _Client:
    wrong: int
    tried: float

    def wait_s(self, now: float) -> float:
        if self.wrong < FREE:
            return 0.0
        pause_s = min(LONGEST_S, 2.0 ** min(self.wrong - FREE, 10))
        return max(0.0, self.tried + pause_s - now)


class Attempts:
    """Counts tries; `begin` before a password is looked at, `succeeded` after a right one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}  # the latest last
        self._left, self._filled = float(TOGETHER), clock()

    def begin(self, address: str) -> float:
        """Seconds that `address` has to wait; 0: it may try, and that counts as wrong for now."""
        key = client_of(address)
        with self._lock:
            now = self._clock()
            self._refill(now)
            client = self._clients.pop(key, None)
            if client is None or now - client.tried > FORGOTTEN_S:
                client = _Client(0, now)
            wait_s = client.wait_s(now) or max(0.0, 1.0 - self._left) * TOGETHER_S
            if not wait_s:
                client.wrong, client.tried = client.wrong + 1, now
                self._left -= 1.0
            if client.wrong:
                self._clients[key] = client
            if len(self._clients) > MOST:
                del self._clients[next(iter(self._clients))]
            return wait_s

    def succeeded(self, address: str) -> None:
        with self._lock:
            self._clients.pop(client_of(address), None)
            self._left = min(TOGETHER, self._left + 1.0)

    def _refill(self, now: float) -> None:
        self._left = min(TOGETHER, self._left + (now - self._filled) / TOGETHER_S)
        self._filled = now


def client_of(address: str) -> str:
    """Whom an address stands for: of IPv6 the /64, which one client has to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


IDLE_S = 12 * 3600.0
SESSION_S = 7 * 24 * 3600.0
MOST_SESSIONS = 1000


class Sessions:
    """Open sessions by a hash of their token: not even the memory holds what a cookie holds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[float, float]] = {}  # began and last seen, in this order

    def open(self) -> str:
        """A new session's token. The one not seen for longest makes room."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            while len(self._open) >= MOST_SESSIONS:
                del self._open[next(iter(self._open))]
            self._open[_key(token)] = (now, now)
        return token

    def knows(self, token: str) -> bool:
        """Whether the session is open; it then stays so for another IDLE_S."""
        key, now = _key(token), self._clock()
        with self._lock:
            began, seen = self._open.pop(key, (-SESSION_S, -IDLE_S))
            if now - seen >= IDLE_S or now - began >= SESSION_S:
                return False
            self._open[key] = (began, now)
            return True

    def close(self, token: str) -> None:
        with self._lock:
            self._open.pop(_key(token), None)


def _key(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
