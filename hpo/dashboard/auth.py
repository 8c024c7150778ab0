"""Passwords and tokens, sessions, and the login throttle.

Password and token come from files or from the environment, never from the command line, where every
user of the machine sees them.
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

MIN_PASSWORD = 8
MIN_TOKEN = 20
"""Guesses at tokens are not slowed down as those at passwords are, so tokens are long."""
MAX_FILE_BYTES = 4096
CONTAINER_SECRETS = Path("/run/secrets")
"""Where containers find their secrets, readable by all users of the container."""


@dataclass(frozen=True)
class Credentials:
    """Keyed hashes of the password and of the token; without either there is no login."""

    password: bytes | None = None
    token: bytes | None = None
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @classmethod
    def of(cls, *, password: str | None = None, token: str | None = None) -> Credentials:
        """Hash them; raise InputError for a password or token that is too short."""
        plain = cls()
        _check_length(password, "password", MIN_PASSWORD)
        _check_length(token, "token", MIN_TOKEN)
        return cls(
            None if password is None else plain._hash(password),
            None if token is None else plain._hash(token),
            plain.key,
        )

    @property
    def required(self) -> bool:
        """True if there is a login."""
        return self.password is not None or self.token is not None

    def is_password(self, given: str) -> bool:
        """Return whether `given` is the password or the token, always in the same time."""
        return self._is(given, self.password) | self._is(given, self.token)

    def is_token(self, given: str) -> bool:
        """Return whether `given` is the token."""
        return self._is(given, self.token)

    def _is(self, given: str, expected: bytes | None) -> bool:
        return hmac.compare_digest(self._hash(given), expected or b"")

    def _hash(self, text: str) -> bytes:
        # An accented letter is one code point or two, depending on the keyboard.
        raw = unicodedata.normalize("NFC", text).encode(errors="surrogatepass")
        return hmac.digest(self.key, raw, hashlib.sha256)


def read_credentials(
    password_file: Path | None, token_file: Path | None, environment: Mapping[str, str]
) -> Credentials:
    """Read them from the files, or else from the variables PASSWORD and TOKEN. Raise InputError for
    a file that is missing, empty, or open to every user of the machine, and for a password or token
    that is too short."""
    password, token = environment.get(PASSWORD) or None, environment.get(TOKEN) or None
    if password_file is not None:
        password = _read(password_file, "password")
    if token_file is not None:
        token = _read(token_file, "token")
    return Credentials.of(password=password, token=token)


def from_environment(environment: Mapping[str, str]) -> Credentials:
    """Read them as the environment variables alone say."""

    def path(name: str) -> Path | None:
        return Path(environment[name]) if environment.get(name) else None

    return read_credentials(path(PASSWORD_FILE), path(TOKEN_FILE), environment)


def _read(path: Path, what: str) -> str:
    """Return the one line of `path`."""
    where = f"{what} file {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}; write the {what} into it") from None
    private = not mode & (stat.S_IROTH | stat.S_IWOTH)
    if stat.S_ISREG(mode) and not private and not path.is_relative_to(CONTAINER_SECRETS):
        raise InputError(f"{where}: open to every user of this machine; chmod 600 {path}")
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8 text") from None
    if len(raw) > MAX_FILE_BYTES or len(lines) > 1:
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


FREE_ATTEMPTS = 5
MAX_WAIT_S = 300.0
FORGET_S = 3600.0
ALL_ATTEMPTS = 60
REFILL_S = 5.0  # until one of ALL_ATTEMPTS comes back
MAX_CLIENTS = 10_000


@dataclass
class _Client:
    failures: int
    last: float

    def wait_s(self, now: float) -> float:
        if self.failures < FREE_ATTEMPTS:
            return 0.0
        pause_s = min(MAX_WAIT_S, 2.0 ** min(self.failures - FREE_ATTEMPTS, 10))
        return max(0.0, self.last + pause_s - now)


class LoginThrottle:
    """Delays guesses at passwords: call `begin` before one is compared, `succeeded` after a right
    one.

    A client has FREE_ATTEMPTS, then waits 1, 2, 4, ... seconds. All clients together have
    ALL_ATTEMPTS, refilled slowly, against guesses from many addresses; while none is left, nobody
    can log in by password. Sessions and the token keep working.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[str, _Client] = {}  # the most recent last
        self._left, self._filled = float(ALL_ATTEMPTS), clock()

    def begin(self, address: str) -> float:
        """Return the seconds that `address` has to wait; 0: it may try, which counts as wrong until
        `succeeded`."""
        key = client_of(address)
        with self._lock:
            now = self._clock()
            self._refill(now)
            client = self._clients.pop(key, None)
            if client is None or now - client.last > FORGET_S:
                client = _Client(0, now)
            wait_s = client.wait_s(now) or max(0.0, 1.0 - self._left) * REFILL_S
            if not wait_s:
                client.failures, client.last = client.failures + 1, now
                self._left -= 1.0
            if client.failures:
                self._clients[key] = client
            if len(self._clients) > MAX_CLIENTS:
                del self._clients[next(iter(self._clients))]
            return wait_s

    def succeeded(self, address: str) -> None:
        """Forget the failures of `address`."""
        with self._lock:
            self._clients.pop(client_of(address), None)
            self._left = min(ALL_ATTEMPTS, self._left + 1.0)

    def _refill(self, now: float) -> None:
        self._left = min(ALL_ATTEMPTS, self._left + (now - self._filled) / REFILL_S)
        self._filled = now


def client_of(address: str) -> str:
    """Return whom `address` counts for: of IPv6 the /64, which one client has to itself."""
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
MAX_SESSION_S = 7 * 24 * 3600.0
MAX_SESSIONS = 1000


class Sessions:
    """Open sessions by a hash of their token: not even memory holds what a cookie holds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[float, float]] = {}  # start and last use, ordered by use

    def open(self) -> str:
        """Return a new session's token. The longest unused session makes room."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            while len(self._open) >= MAX_SESSIONS:
                del self._open[next(iter(self._open))]
            self._open[_key(token)] = (now, now)
        return token

    def is_open(self, token: str) -> bool:
        """Return whether the session is open; if so it stays open for another IDLE_S."""
        key, now = _key(token), self._clock()
        with self._lock:
            began, used = self._open.pop(key, (-MAX_SESSION_S, -IDLE_S))
            if now - used >= IDLE_S or now - began >= MAX_SESSION_S:
                return False
            self._open[key] = (began, now)
            return True

    def close(self, token: str) -> None:
        """End the session, if it is open."""
        with self._lock:
            self._open.pop(_key(token), None)


def _key(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
