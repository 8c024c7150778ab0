"""Files that all hosts of a study reach: a folder that each of them mounts, or an object store.

    put(local, key)     visible means complete: object stores do that, folders write beside and move
    get(key, local)     likewise
    remove(key)
    list(prefix)

A URL is a folder's path, file://, or what fsspec knows: s3://bucket/folder, gs://, az://, ... It
holds no secret, so it may be stored and shown: credentials come from the environment, or from where
the provider keeps them.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, InputError, NotFound, StorageError
from hpo.extras import install_command
from hpo.io import atomic_path, raising_disk_full

OBJECT_STORES = frozenset(
    ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2", "tos"]
)
"""An object appears there whole, and there are no folders to make."""
EXTRAS = {"s3": "s3", "s3a": "s3"}
"""The extra of ours that brings what a protocol needs; of the others fsspec tells the package."""
CHUNK = 4 * 2**20

Moved = Callable[[], None]
"""Called whenever some more of a file has been moved; must not raise."""


def nothing() -> None:
    """Do nothing: nobody waits for the file."""


class Store(ABC):
    """Files by key, a relative path with `/` between its parts.

    Methods raise StorageError, naming the store, where it cannot be reached or used, and for a key
    that would lead outside of it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def put(self, local: Path, key: str, moved: Moved = nothing) -> None:
        """Store the file `local` under `key`, replacing what is there; whole or not at all."""
        with self._told(f"{key} cannot be written"):
            self._put(local, checked(key), moved)
        moved()  # not every provider tells

    def get(self, key: str, local: Path, moved: Moved = nothing) -> None:
        """Bring `key` to the file `local`, whole or not at all. Raises NotFound where there is no
        such key, DiskFull where it does not fit here."""
        told = self._told(f"{key} cannot be read")
        with told, raising_disk_full(local), atomic_path(local) as temporary:
            try:
                self._get(checked(key), temporary, moved)
            except FileNotFoundError:
                raise NotFound(f"artifacts {self.url}: {key} is not there") from None

    def remove(self, key: str) -> None:
        """Remove `key`; nothing where it is not there."""
        with self._told(f"{key} cannot be removed"), suppress(FileNotFoundError):
            self._remove(checked(key))

    def folders(self) -> list[str]:
        """Return the names of what stands at the top, sorted; empty where nothing does."""
        with self._told("it cannot be listed"):
            return sorted(self._folders())

    def list(self, prefix: str) -> list[str]:
        """Return all keys under the folder `prefix`, sorted; empty where there is no such
        folder."""
        with self._told(f"{prefix} cannot be listed"), suppress(FileNotFoundError):
            return sorted(self._list(checked(prefix)))
        return []

    def check(self) -> None:
        """Write, list, read back and remove a small file."""
        folder = f"hpo-check-{secrets.token_hex(8)}"
        key = f"{folder}/file"
        with tempfile.TemporaryDirectory() as own:
            sent, back = Path(own, "sent"), Path(own, "back")
            sent.write_text(folder)
            self.put(sent, key)
            try:
                listed = self.list(folder)
                self.get(key, back)
            finally:
                self.remove(key)
            if listed != [key] or back.read_text() != folder:
                raise StorageError(f"artifacts {self.url}: what is written is not what is read")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Raise whatever a provider raises as StorageError, in one line."""
        try:
            yield
        except HpoError:
            raise
        except Exception as error:  # providers raise anything
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            text = re.sub(r"\?\S+", "?...", " ".join(reason.split()))  # a signed URL is a secret
            message = f"artifacts {self.url}: {what}: {text or type(error).__name__}"
            raise StorageError(message) from error

    @abstractmethod
    def _put(self, local: Path, key: str, moved: Moved) -> None: ...

    @abstractmethod
    def _get(self, key: str, local: Path, moved: Moved) -> None: ...

    @abstractmethod
    def _remove(self, key: str) -> None: ...

    @abstractmethod
    def _list(self, prefix: str) -> Iterator[str]: ...

    @abstractmethod
    def _folders(self) -> Iterator[str]: ...


class Folder(Store):
    """A folder that every host mounts at the same path. Made by `check` alone, one level deep: a
    worker on a host where it is not mounted must not write into an empty one."""

    @property
    def root(self) -> Path:
        """Path of the folder."""
        return Path(self.url)

    def check(self) -> None:
        """Make the folder; raise StorageError if that is impossible."""
        with self._told("the folder cannot be made"):
            try:
                self.root.mkdir(exist_ok=True)
            except FileNotFoundError:
                raise StorageError(
                    f"artifacts {self.url}: {self.root.parent} is not there"
                ) from None
        super().check()

    def _put(self, local: Path, key: str, moved: Moved) -> None:
        if not self.root.is_dir():
            raise StorageError(f"artifacts {self.url}: no such folder on this host: mount it there")
        path = self.root / key
        with atomic_path(path) as temporary:
            _copy(local, temporary, moved)

    def _get(self, key: str, local: Path, moved: Moved) -> None:
        _copy(self.root / key, local, moved)

    def _remove(self, key: str) -> None:
        path = self.root / key
        path.unlink()
        with suppress(OSError):  # not empty
            for folder in path.parents[: len(Path(key).parents) - 1]:
                folder.rmdir()

    def _list(self, prefix: str) -> Iterator[str]:
        for at, _, files in os.walk(self.root / prefix):
            yield from (Path(at, name).relative_to(self.root).as_posix() for name in files)

    def _folders(self) -> Iterator[str]:
        yield from (path.name for path in self.root.iterdir())


class Remote(Store):
    """Anything that fsspec knows."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.protocol = url.partition("://")[0]
        self.files, self.root = _file_system(url, self.protocol)

    def _put(self, local: Path, key: str, moved: Moved) -> None:
        path = f"{self.root}/{key}"
        if self.protocol in OBJECT_STORES:
            self.files.put_file(str(local), path, callback=_callback(moved))
            return
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/.{name}.{secrets.token_hex(4)}"
        self.files.makedirs(folder, exist_ok=True)
        self.files.put_file(str(local), beside, callback=_callback(moved))
        self.files.mv(beside, path)

    def _get(self, key: str, local: Path, moved: Moved) -> None:
        self.files.get_file(f"{self.root}/{key}", str(local), callback=_callback(moved))

    def _remove(self, key: str) -> None:
        self.files.rm_file(f"{self.root}/{key}")

    def _list(self, prefix: str) -> Iterator[str]:
        self.files.invalidate_cache()  # some providers remember listings
        for path in self.files.find(f"{self.root}/{prefix}"):
            yield str(path).removeprefix(self.root).lstrip("/")

    def _folders(self) -> Iterator[str]:
        self.files.invalidate_cache()
        with suppress(FileNotFoundError):  # an object store has no empty folders
            for path in self.files.ls(self.root, detail=False):
                yield str(path).rstrip("/").rpartition("/")[2]


def open_store(url: str) -> Store:
    """Return the store at `url`; touches nothing there. Raises InputError as `normal` does, and
    where a package is missing."""
    url = normal(url)
    return Remote(url) if "://" in url else Folder(url)


def normal(url: str) -> str:
    """Return `url` in its one form: a folder as an absolute path, others without a trailing slash.

    Raises InputError for what is no such URL, and for one that may hold a secret, without its text.
    """
    scheme, separator, rest = url.partition("://")
    if not url.isprintable() or not url.strip():
        raise InputError("--artifacts: give a folder or a URL, such as s3://BUCKET/FOLDER")
    if not separator or scheme in ("file", "local"):
        if separator and not rest.startswith("/"):
            raise InputError(f"--artifacts {url}: write file:///FOLDER, with three slashes")
        return os.path.normpath(Path(rest if separator else url).expanduser().absolute())
    if re.search(r"[?#]", rest) or (":" in rest.rpartition("@")[0]) or _is_login(scheme, rest):
        raise InputError(
            "--artifacts: the URL holds a password, a key or a query (its text is not shown); "
            "leave them out: credentials come from the environment (AWS_ACCESS_KEY_ID, ...) or "
            "the provider's own files"
        )
    if scheme == "memory":
        raise InputError(f"--artifacts {url}: the memory of one process; no worker would see it")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or "::" in url or not rest.strip("/"):
        raise InputError(f"--artifacts {url}: give a folder or a URL, such as s3://BUCKET/FOLDER")
    return url.rstrip("/")


def _is_login(scheme: str, rest: str) -> bool:
    """Return whether it is KEY:SECRET, cut off at a slash of the secret: a bucket has no colon, a
    port is a number."""
    _, colon, port = rest.partition("/")[0].rpartition(":")
    return bool(colon) and (scheme in OBJECT_STORES or not port.isdigit())


def checked(key: str) -> str:
    """Return `key`; raises StorageError for one that could lead out of its store."""
    parts = key.split("/")
    if not key.isprintable() or "\\" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{key[:80]!r} is no name of an artifact: refused")
    return key


def _copy(source: Path, target: Path, moved: Moved) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while data := read.read(CHUNK):
            write.write(data)
            moved()


def _file_system(url: str, protocol: str) -> tuple[Any, str]:
    """Return fsspec's file system of `url`, and the path of `url` in it."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        advice = install_command(extra) if extra else str(error)
        raise InputError(f"--artifacts {url}: {protocol}:// needs a package: {advice}") from None
    except ValueError as error:
        raise InputError(f"--artifacts {url}: {error}; known: s3, gs, az, ...") from None
    return files, str(root).rstrip("/")


def _callback(moved: Moved) -> Any:
    from fsspec.callbacks import Callback

    return Callback(hooks={"moved": lambda size, value: moved()})
