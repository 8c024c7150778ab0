"""Who may come in: a password for people, a token for scripts, read once at the start.

Both come from files or from the environment, never from the command line, where every user of the
machine sees it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import unicodedata
from collections.abc import Mapping
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
