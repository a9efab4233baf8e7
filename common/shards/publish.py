"""Claim, resume, publish, discard.

A job writes to `<save_path>.part`. A shard is written under a temporary name, made durable, and renamed, with a
record of its tensors (hashes, statistics) beside it under `.run/`. When every shard of every output is there, each
directory is renamed to its final name. `.run/run.json` says which job a directory belongs to: the same command
resumes at the last complete shard, any other is refused.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from common.errors import DataError
from common.shards.headers import INDEX_NAME
from common.shards.layout import Output, Shard, index_text
from common.shards.places import MOVING, REFUSED, RUN, is_half_published, refuse_existing, refuse_what_appeared
from common.shards.sink import record_path
from common.shards.staging import lock, move, remove, sync, write_file


def _state(directory: Path, run: str = RUN) -> dict | None:
    try:
        return json.loads((directory / run / "run.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def difference(theirs: dict, ours: dict) -> str:
    """What sets two jobs apart, in one phrase: "seed 1 there, 2 here"."""
    for key in [*ours, *theirs]:
        if theirs.get(key) != ours.get(key):
            if isinstance(theirs.get(key), dict) and isinstance(ours.get(key), dict):
                return difference(theirs[key], ours[key])
            return f"{key}: {theirs.get(key)!s:.60} there, {ours.get(key)!s:.60} here"
    return "nothing"


def unpublished(outputs: list[Output], identity: dict) -> list[Output]:
    """Outputs still to be renamed: all, unless an earlier attempt was stopped between renames.

    Outputs are renamed in order, and the first one's record is deleted last: while it is there, the job is not over.
    """
    if not outputs[0].final.is_dir() or _state(outputs[0].final) != identity:
        return outputs
    return [output for output in outputs[1:] if output.part.is_dir() or not output.final.is_dir()]


def _is_refused(part: Path) -> bool:
    return (part / RUN / REFUSED).is_file()


def _strangers(part: Path) -> list[Path]:
    return [path for path in part.iterdir() if path.name != RUN]


def refuse_another_job(part: Path, identity: dict, overwrite: bool) -> None:
    """DataError if `part` holds what another job has written, unless it may be replaced."""
    theirs = _state(part) if part.is_dir() else identity
    if theirs != identity and _strangers(part) and not overwrite and not _is_refused(part):
        what = difference(theirs, identity) if theirs else "no record of a job in it"
        raise DataError(
            f"{part}: left by another job ({what}); finish that job with its own command, "
            "delete the directory, or give --overwrite to start afresh"
        )


def refuse_half_published(final: Path, part: Path, identity: dict) -> None:
    """DataError if another job was stopped while it moved its files to a mount point: nothing there may be deleted."""
    theirs = _state(part) or _state(final, MOVING)
    if theirs and theirs != identity:
        raise DataError(
            f"{final}: half published by another job ({difference(theirs, identity)}); finish that job with its own "
            "command, or give --overwrite to start afresh"
        )


def claim(output: Output, identity: dict, overwrite: bool) -> int:
    """Lock the output's .part for this job; returns a descriptor to hold. Raises DataError if it is not ours."""
    refuse_existing(output.final, overwrite)
    part = output.part
    if is_half_published(output.final) and not overwrite:
        refuse_half_published(output.final, part, identity)
    fresh = not part.exists()
    descriptor = lock(part)  # before what is in it is looked at: another job may be about to fill it
    if not fresh and _state(part) == identity and not _is_refused(part):
        return descriptor
    try:
        refuse_another_job(part, identity, overwrite)
    except DataError:
        os.close(descriptor)
        raise
    for path in _strangers(part):
        remove(path)
    for path in (part / RUN).glob("*.json"):
        path.unlink()
    write_file(part / RUN / "run.json", json.dumps(identity, indent=1).encode())
    (part / RUN / REFUSED).unlink(missing_ok=True)
    return descriptor


def whole_shards(waiting: list[Output], outputs: list[Output]) -> set[int]:
    """Numbers of the shards that are complete in every output still to be published."""
    return {
        i
        for i in range(len(outputs[0].shards))
        if all(record_path(o, i).is_file() and _is_whole(o.part / o.shards[i].filename, o.shards[i]) for o in waiting)
    }


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.nbytes


def remove_additions(output: Output) -> None:
    """Delete what an earlier attempt put beside the complete shards: its source may have changed or be gone."""
    shards = {shard.filename for shard in output.shards}
    for path in _strangers(output.part):
        if path.name not in shards:
            remove(path)


def release(output: Output, descriptor: int) -> None:
    """Give up a claim; a .part in which nothing was written is deleted."""
    if all(path.name == RUN for path in output.part.iterdir()):
        shutil.rmtree(output.part, ignore_errors=True)
    os.close(descriptor)


def records(output: Output) -> dict[str, dict]:
    """{tensor: record} of a finished output, in the order of the plan."""
    return {
        name: record
        for shard in range(len(output.shards))
        for name, record in json.loads(record_path(output, shard).read_text()).items()
    }


def publish(outputs: list[Output], overwrite: bool) -> None:
    """Make every output durable, then rename each to its final name, in order.

    If this is interrupted anywhere, the same command resumes: the first output's record is deleted last. Raises
    FileExistsError if something has appeared under a final name while the job ran.
    """
    waiting = [output for output in outputs if output.part.is_dir()]
    for output in waiting:
        if len(output.shards) > 1:
            (output.part / INDEX_NAME).write_text(index_text(list(output.shards)), encoding="utf-8")
        for path in output.part.rglob("*"):
            if RUN not in path.relative_to(output.part).parts:  # the job's own record, which is deleted
                sync(path)
        sync(output.part)
    for output in waiting:
        refuse_what_appeared(output.final, overwrite)
    for output in waiting:
        move(output.part, output.final)
    forget(outputs)


def forget(outputs: list[Output]) -> None:
    """Delete the records of this job in outputs that were published, the first one's last: they are like any other."""
    for output in reversed(outputs):
        _forget(output.final / RUN)


def _forget(directory: Path) -> None:
    """Delete the record of a job, run.json last: if this is interrupted, the same command resumes."""
    if directory.is_dir():
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "run.json"):
            path.unlink(missing_ok=True)
        directory.rmdir()


def discard(outputs: list[Output]) -> None:
    """Delete what a job that was refused on its data has written: resuming would only meet the same data."""
    for output in outputs:
        shutil.rmtree(output.part, ignore_errors=True)


def mark_refused(outputs: list[Output]) -> None:
    """The same of a process that does not hold the outputs, while the one that does may be writing there: they are
    emptied at the next start, whatever job that is."""
    for output in outputs:
        with contextlib.suppress(OSError):  # the other may have met bad data, too, and be deleting them
            (output.part / RUN / REFUSED).touch()
