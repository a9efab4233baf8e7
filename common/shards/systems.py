"""What an operating system or a file system may lack, and how to do without: one line where a guarantee is lost."""

import errno
import os
import sys
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = _UNSUPPORTED | {errno.ENOLCK}


_warned: set[tuple[str, int]] = set()  # (what, file system): one line for each, not one for each of a thousand shards
_warning = Lock()  # the writers are threads: two may find out at the same moment


def _warn(what: str, descriptor: int, line: str) -> None:
    key = what, os.fstat(descriptor).st_dev
    with _warning:
        if key not in _warned:
            _warned.add(key)
            print(f"warning: {line}", file=sys.stderr, flush=True)


def make_durable(descriptor: int, path: Path) -> None:
    """fsync: return when what was written would survive a power cut. Where a file system cannot say, continue.

    macOS's fsync leaves the bytes in the disk's own memory; F_FULLFSYNC is what does there what fsync does on Linux.
    """
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError:  # network disks know only fsync
                pass
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn(
            "fsync",
            descriptor,
            f"{path}: this file system does not confirm that files are on disk ({error.strerror}); after a power cut, "
            "check the output with --verify",
        )


def try_lock(descriptor: int, path: Path) -> bool:
    """Whether this process alone now holds the lock on an open file; True, with a line, where there are no locks.

    The kernel releases it when the process ends.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # an OSError too, so asked for first
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(
            "flock",
            descriptor,
            f"{path}: this file system has no locks ({error.strerror}), so nothing keeps a second job from writing "
            "there; run one at a time",
        )
    return True


def cores() -> int:
    """How many cores this process may run on; all of them where the system cannot say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
