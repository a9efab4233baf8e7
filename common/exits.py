"""How a script ends: signals, exit codes, the one line of an error, output that nobody reads."""

import contextlib
import errno
import gc
import os
import resource
import signal
import sys

from common.errors import DataError


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        written = error.filename2 or error.filename  # of two, the second is where to
        where = f" while writing {written}" if written else ""
        return f"the disk is full{where}; free some space and run the same command again: it resumes there"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; fix that and run the same command again"
    return str(error)


class Stopped(BaseException):
    """SIGTERM or SIGHUP arrived; like KeyboardInterrupt it must unwind through everything."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _on_signal(number, _frame):
    raise Stopped(number)


class Stream:
    """stdout or stderr that never fails: what cannot be printed is dropped, and `failure` says why.

    Prints come before an output is published and a progress bar while it is written: a reader that has gone away
    (`| head`, a dropped ssh) must not stop either.
    """

    def __init__(self, stream):
        self._stream, self.failure = stream, None

    def _try(self, call, *arguments) -> None:
        if self.failure is None:
            try:
                getattr(self._stream, call)(*arguments)
            except (OSError, AttributeError) as error:  # the stream is None if it was closed from the start
                self.failure = getattr(error, "strerror", None) or "it is closed"

    def write(self, text: str) -> int:
        """Print, if that is possible -> the length of the text, as of any stream."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._try("flush")

    def isatty(self) -> bool:
        """Whether it is a terminal: progress bars ask."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _safe_streams():
    """stdout and stderr as Streams; on leaving they are the old ones again -> stdout's."""
    # Files take the lowest free number: a checkpoint opened as 2 would get what C libraries print there.
    opened = [os.open(os.devnull, os.O_RDWR)]
    while opened[-1] <= 2:
        opened.append(os.open(os.devnull, os.O_RDWR))
    os.close(opened[-1])
    streams = sys.stdout, sys.stderr
    for stream in streams:
        with contextlib.suppress(AttributeError):  # closed from the start, or a test's own
            stream.reconfigure(errors="backslashreplace")  # rather than fail on a name that the terminal cannot show
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = streams


def _give_up(stream) -> None:
    """Let Python's own flush at exit find a stream that takes what is left in its buffer."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _call(main) -> str | int | None:
    """main() -> what sys.exit gets: None, a line, or an exit status."""
    try:
        main()
    except SystemExit as leave:  # argparse: --help, a usage error
        return leave.code
    except (DataError, OSError) as error:
        return f"error: {_one_line(error)}"
    except (KeyboardInterrupt, Stopped) as stop:
        print(
            "\ninterrupted; nothing half-written was published. Run the same command again: a job that writes a "
            "checkpoint resumes at the last complete shard.",
            file=sys.stderr,
        )
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    return None


def _allow_many_files() -> None:
    """Raise the number of files that may be open: each worker holds every shard of every input open, twice (through the
    page cache and past it), and the usual 1024 are too few for five models on 8 cores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS says that there is no limit, and refuses more than 10240.
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 10240)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(main) -> None:
    """Call main() and exit: 0 done, 1 bad data or environment in one line on stderr, 129/130/143 interrupted.

    A closed stdout stops nothing: main() gets to its end, and then the exit status is 1. argparse itself exits with 2
    on a usage error.
    """
    # Importing torch and transformers makes 400,000 objects, none of them garbage. With Python's own threshold, some
    # hundred new ones, looking for it takes a fifth of the time of importing them.
    gc.set_threshold(100_000, 50, 50)
    _allow_many_files()
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it, and that must stay so
        signal.signal(signal.SIGHUP, _on_signal)
    with _safe_streams() as stdout:
        status = _call(main)
        stdout.flush()
    gc.freeze()  # or Python would search them once more on leaving: a second, after torch and transformers
    if stdout.failure:
        _give_up(sys.stdout)
        status = (
            status or f"error: not everything could be printed ({stdout.failure}); what was to be written is written"
        )
    if status is not None:
        sys.exit(status)


def run_and_leave(main) -> None:
    """run(), for a script that has nothing to tidy up: Python's own shutdown would take another 0.1 s."""
    run(main)
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(0)
