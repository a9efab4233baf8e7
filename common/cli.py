"""Command-line types and shared flags."""

import argparse
import math
import os
from pathlib import Path

from common.errors import DataError
from common.shards.hub import is_hub_id
from common.shards.places import plain

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def path(text: str) -> Path:
    """A path flag's value: '~/x' -> the home directory's x, './x', 'x/' and 'a/../x' -> x.

    A shell does not expand ~ after `=`, and nobody means a directory named `~`, nor an empty path, which is what an
    unset shell variable leaves. Both are usage errors where they cannot be resolved.
    """
    expanded = os.path.expanduser(text)
    if not expanded:
        raise argparse.ArgumentTypeError("an empty path; is a shell variable in it not set?")
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such home directory; write the path out")
    try:
        expanded.encode()
    except UnicodeEncodeError:  # what is written names it in UTF-8, and that would fail when all work is done
        raise DataError(f"{ascii(text)}: not UTF-8, or a locale without it; rename it, or set LC_ALL=C.UTF-8") from None
    return plain(Path(expanded))


def path_or_hub_id(text: str) -> str:
    """The same as text, but 'org/name' is left alone: a Hub id unless there is such a directory.

    What is not a Hub id as typed does not become one: './org/name' and 'org/name/' that do not exist -> './org/name'.
    """
    if is_hub_id(text):
        return text
    place = str(path(text))
    return f"./{place}" if is_hub_id(place) else place


def positive_int(text: str) -> int:
    """'64' -> 64; anything but a whole number of at least 1 (and below 2**63) is a usage error."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def seed(text: str) -> int:
    """'0' -> 0; anything but a whole number of at least 0 is a usage error: numpy's generators take no other."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return value


def sparsity(text: str) -> float:
    """'0.75' -> 0.75, the fraction to zero; must be in [0, 1)."""
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


def points(text: str) -> float:
    """'0.5' -> 0.5 points of a score in percent; below 0 is a usage error."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is below 0; a margin is 0 or more")
    return value


def limit(text: str) -> int | float:
    """'100' -> 100 items of each task, '0.1' -> a tenth of them."""
    value = finite_float(text)
    if value <= 0 or (value >= 1 and not value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of items nor a share between 0 and 1")
    return value if value < 1 else int(value)


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
        "--overwrite", action="store_true", help="replace an existing output once the new one is complete"
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be read and written, and how much disk and memory it takes; then stop",
    )


def add_skip_flag(group) -> None:
    """--skip, of the scripts that match the tensors of two models."""
    group.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="leave out fine-tuned tensors of these names, e.g. 'v_head.*' 'score.*'; the base's stay as they are",
    )


def add_verify_flag(group) -> None:
    """--verify, of the scripts at the end of the chain; see common.shards.verify."""
    group.add_argument(
        "--verify",
        type=path,
        nargs="+",
        metavar="DIR",
        help="read back what convert, extract, prune or merge wrote and compare every tensor with its recorded hash",
    )


def add_plot_flags(group) -> None:
    """The flags of the pictures of pruning; see common.pruners.heatmaps."""
    group.add_argument(
        "--plot_path",
        type=picture,
        metavar="FILE",
        help="draw overlap, L2 share kept and evenness, layer by layer, to this .png, .pdf or .svg",
    )
    group.add_argument(
        "--plot_reports",
        type=path,
        nargs="+",
        metavar="DIR",
        help="with --plot_path: draw these outputs of an earlier job instead of pruning",
    )
    group.add_argument(
        "--plot_with",
        type=path,
        nargs="+",
        metavar="DIR",
        help="with --plot_path: draw the outputs of another way of pruning beside these; as many as these",
    )


def check_plot_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, drawn: list | None) -> None:
    """Usage error for pictures without a path, or of two jobs that differ in how many outputs they have."""
    if (args.plot_reports or args.plot_with) and not args.plot_path:
        parser.error("--plot_reports and --plot_with need --plot_path, where the picture goes")
    if args.plot_with and len(args.plot_with) != len(drawn):
        parser.error(
            f"--plot_with names {len(args.plot_with)} outputs of another way of pruning, and this job has {len(drawn)}"
        )


def picture(text: str) -> Path:
    """'a/b.png' -> its path; a file name that does not end in .png, .pdf or .svg is a usage error."""
    if not text.lower().endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .pdf or .svg")
    return path(text)


def is_alone(parser: argparse.ArgumentParser, args: argparse.Namespace, flag: str, *companions: str) -> bool:
    """Whether `flag` was given; a usage error if flags other than its companions were, too.

    For parsers without required flags: a flag was given if it differs from its default.
    """
    defaults = vars(parser.parse_args([]))
    given = {name for name, value in vars(args).items() if value != defaults[name]}
    clash = sorted(given - {flag, *companions})
    if flag in given and clash:
        parser.error(f"--{flag} does not go with {', '.join('--' + name for name in clash)}")
    return flag in given
