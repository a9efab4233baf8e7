"""Command-line types, shared flags, exit codes."""

import argparse
import errno
import math
import os
import signal
import sys

from common.errors import DataError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def positive_int(text: str) -> int:
    """'64' -> 64; anything that is no whole number of at least 1 (and below 2**63) is a usage error."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def sparsity(text: str) -> float:
    """'0.75' -> 0.75, the fraction to zero; must lie in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 up to, not including, 1")
    return value


def byte_size(text: str) -> int:
    """'5GB' -> 5000000000 bytes; a plain number is bytes, KiB/MiB/GiB are powers of two."""
    number = text.strip().upper().rstrip("BKMGI")
    unit = text.strip().upper()[len(number) :] or "B"
    try:
        value = int(float(number) * _UNITS[unit if unit.endswith("B") else unit + "B"])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 4GiB")
    return value


def finite_float(text: str) -> float:
    """'1.2' -> 1.2; not a number, NaN and infinity are usage errors."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def batch_size(text: str) -> int | str:
    """'8' -> 8; 'auto' and 'auto:4' (lm-eval finds the largest that fits, here 4 times) stay text."""
    if text == "auto" or (text.startswith("auto:") and text[5:].isdigit()):
        return text
    return positive_int(text)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script that writes checkpoints has."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--max_shard_size",
        type=byte_size,
        default="5GB",
        metavar="SIZE",
        help="start a new safetensors file beyond this size, e.g. 5GB, 500MB (default: 5GB)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace an existing output once the new one is whole"
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be read and written, how many bytes, disk and memory, and stop",
    )


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}; free some space and run the same command again: it goes on from there"
        )
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
            "\ninterrupted; nothing was published. The same command goes on from the last whole shard.",
            file=sys.stderr,
        )
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 143)
