"""How a script ends: signals, exit codes, the one line of an error."""

import errno
import os
import signal
import sys

from common.errors import DataError


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the same command again: it goes on from there"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; mend that and run the same command again"
    return str(error)


class Stopped(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt it must unwind through everything."""


def _on_sigterm(_signal, _frame):
    raise Stopped


def run(main) -> None:
    """Call main() and exit: 0 done, 1 bad data or environment in one line on stderr, 130/143 interrupted.

    argparse itself exits with 2 on a usage error.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        main()
        sys.stdout.flush()
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os._exit(1)
        sys.exit(f"error: {_one_line(error)}")
    except (KeyboardInterrupt, Stopped) as stop:
        print(
            "\ninterrupted; nothing half-written was published. The same command goes on from what is whole.",
            file=sys.stderr,
        )
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 143)


def run_and_leave(main) -> None:
    """run(), for a script that has nothing to tidy up: Python would take another 0.1 s to take itself apart."""
    run(main)
    sys.stderr.flush()
    os._exit(0)
