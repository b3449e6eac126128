"""Which processes are alive: locks that the system takes back from a process that dies.

A worker holds a lock on a file of its own. When it dies, however it dies, the system drops the
lock, and whoever asks next sees it at once: no waiting time has to be guessed, and a worker that is
only slow, or stopped for an hour, is never taken for dead. From another machine the lock cannot be
trusted (some network file systems do not carry it), so there a worker counts as dead when it has
not touched its file for ``GRACE`` seconds, by the clock of the file server.

Needs POSIX record locks: Linux, macOS, or WSL on Windows.
"""

from __future__ import annotations

import os
import platform
import threading
import uuid
from pathlib import Path
from typing import Any

__all__ = ["GRACE", "FileLock", "Lease"]

BEAT = 10.0  # seconds between two touches
GRACE = 120.0  # seconds without one after which a worker elsewhere is dead

_MINE: set[str] = set()  # a process cannot ask for its own locks


class FileLock:
    """``with FileLock(path):`` one process at a time; a process that dies lets go of it.

    It does not keep the threads of one process apart.

    Args:
        path: The file, which stays.
        wait: Whether to wait for a process that holds it.

    Raises:
        BlockingIOError: If another process holds it, without ``wait``.
    """

    def __init__(self, path: Path, *, wait: bool = True) -> None:
        self.path = path
        self.wait = wait
        self._file = -1

    def __enter__(self) -> FileLock:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _locks().lockf(self._file, _locks().LOCK_EX | (0 if self.wait else _locks().LOCK_NB))
        except OSError as error:
            os.close(self._file)
            raise BlockingIOError(f"another process holds {self.path}") from error
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)  # and with it the lock


class Lease:
    """The sign of life of this process, as a file in ``folder``, from ``with`` to its end.

    Attributes:
        name: Names the worker: machine, process, and a part that makes it unique.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._file = -1

    def __enter__(self) -> Lease:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT, 0o666)
        _locks().lockf(self._file, _locks().LOCK_EX)
        _MINE.add(self.name)
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._beats.join()
        _MINE.discard(self.name)
        (self.folder / self.name).unlink(missing_ok=True)
        os.close(self._file)

    def is_alive(self, name: str) -> bool:
        """Whether the worker of that name still is at work."""
        path = self.folder / name
        if name in _MINE:
            return True
        if not path.exists():
            return False
        if name.rsplit("-", 2)[0] != platform.node():
            os.utime(self._file)
            return os.fstat(self._file).st_mtime - path.stat().st_mtime < GRACE
        return _is_locked(path)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            os.utime(self._file)


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock on ``path``."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        _locks().lockf(file, _locks().LOCK_EX | _locks().LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(file)
    return False


def _locks() -> Any:
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise ValueError(
            "sweeps need POSIX file locks, which this system lacks; on Windows use WSL."
        ) from error
    return fcntl
