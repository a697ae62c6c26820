"""One process at a time in a run directory: a lock that the system releases, however its holder ends."""

import contextlib
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .checkpoints import name_file

_held: set[TextIO] = set()  # open lock files


def _close_copies() -> None:
    """Closes a forked child's copies, which would hold the locks for as long as it lives."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)


def in_use(what: str, process: str) -> str:
    return f"{what} is in use: {process} is training there"


def holder(path: Path) -> str | None:
    """Who holds the lock file `path`, as "process 123"; None where nobody does, as after the holder's end."""
    try:
        file = open(path, encoding="ascii")
    except OSError:  # there is none, or none that may be read: a run that wants the lock will say so
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _process(file)
        except OSError:  # a file system without locks
            return None
    return None


def _process(file: TextIO) -> str:
    file.seek(0)
    number = file.read().strip()
    return f"process {number}" if number else "another process"


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` and removes it in the end.

    BlockingIOError where another process, or another thread of this one, holds it; the message begins with
    `what` and gives the process id. A file system without locks gives a warning.
    """
    file = _acquire(path, what)
    _held.add(file)
    try:
        yield
    finally:
        if file in _held:  # not in a child that was forked inside
            path.unlink(missing_ok=True)
            _held.discard(file)
            file.close()


def _acquire(path: Path, what: str) -> TextIO:
    tries = 0
    while True:
        file = open(path, "a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if (tries := tries + 1) == 10:  # whoever asks for the `holder` has it for a moment
                    raise BlockingIOError(in_use(what, _process(file))) from None
            time.sleep(0.01)
            continue
        except OSError as error:
            warnings.warn(
                f"{what} cannot be locked ({error.strerror}): see to it that no other process trains there",
                stacklevel=2,
            )
            return file
        if _is_at(file, path):
            try:
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())  # a buffer would be written again by close
            except OSError as error:
                path.unlink(missing_ok=True)
                file.close()
                name_file(error, path)
                raise
            return file
        file.close()  # the previous holder has just removed it


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
