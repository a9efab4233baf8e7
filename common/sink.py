"""The sink: shards written whole or not at all, published together, resumed.

A run writes to `<save_path>.part`. A shard is written under a temporary name, made durable, and renamed, with a
record of its tensors (hashes, statistics) beside it under `.run/`. When every shard of every output is there, each
directory is renamed to its final name. `.run/run.json` says which run a directory belongs to: the same command
goes on from the last whole shard, any other is refused.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.direct import File
from common.errors import DataError
from common.plan import Shard, index_text
from common.staging import lock, move, part_of, refuse_existing, sync, write_file

RUN = ".run"


@dataclass(frozen=True)
class Output:
    """One checkpoint to be written: its final path and its files, planned to the last byte."""

    final: Path
    shards: tuple[Shard, ...]

    @property
    def part(self) -> Path:
        return part_of(self.final)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def _state(directory: Path) -> dict | None:
    try:
        return json.loads((directory / RUN / "run.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def difference(theirs: dict, ours: dict) -> str:
    """What sets two runs apart, in one phrase: "seed 1 there, 2 here"."""
    for key in [*ours, *theirs]:
        if theirs.get(key) != ours.get(key):
            if isinstance(theirs.get(key), dict) and isinstance(ours.get(key), dict):
                return difference(theirs[key], ours[key])
            return f"{key}: {theirs.get(key)!s:.60} there, {ours.get(key)!s:.60} here"
    return "nothing"


def unpublished(outputs: list[Output], identity: dict) -> list[Output]:
    """The outputs that this very run, if it was stopped while it published, has yet to rename; else all of them.

    Outputs are renamed in order, and the first one's record goes last: while it is there, the run is not over.
    """
    if not outputs[0].final.is_dir() or _state(outputs[0].final) != identity:
        return outputs
    return [output for output in outputs[1:] if output.part.is_dir() or not output.final.is_dir()]


def claim(output: Output, identity: dict, overwrite: bool) -> int:
    """Lock the output's .part for this run; returns a descriptor to hold. Raises DataError if it is not ours."""
    refuse_existing(output.final, overwrite)
    part = output.part
    fresh = not part.exists()
    descriptor = lock(part)
    theirs = None if fresh else _state(part)
    if theirs == identity:
        return descriptor
    strangers = [path for path in part.iterdir() if path.name != RUN]
    if strangers and not overwrite:
        what = difference(theirs, identity) if theirs else "no record of a run in it"
        os.close(descriptor)
        raise DataError(
            f"{part}: left by another run ({what}); finish that run with its own command, "
            "delete the directory, or give --overwrite to start afresh"
        )
    for path in strangers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (part / RUN).glob("*.json"):
        path.unlink()
    write_file(part / RUN / "run.json", json.dumps(identity, indent=1).encode())
    return descriptor


def whole_shards(waiting: list[Output], outputs: list[Output]) -> set[int]:
    """The numbers of the shards that are whole in every output that waits to be published (of all `outputs`)."""
    return {
        i
        for i in range(len(outputs[0].shards))
        if all(_record_path(o, i).is_file() and (o.part / o.shards[i].filename).is_file() for o in waiting)
    }


def release(output: Output, descriptor: int) -> None:
    """Give up a claim; a .part in which nothing was written goes."""
    if all(path.name == RUN for path in output.part.iterdir()):
        shutil.rmtree(output.part, ignore_errors=True)
    os.close(descriptor)


def _record_path(output: Output, shard: int) -> Path:
    return output.part / RUN / f"{output.shards[shard].filename}.json"


class Sink:
    """Open shards of one run's outputs. Nothing else writes tensors."""

    def __init__(self, outputs: list[Output]):
        self._outputs = outputs
        self._lock = threading.Lock()
        self._files: dict[int, list[File]] = {}
        self._records: dict[int, dict[str, list[dict]]] = {}

    def _temporary(self, output: Output, shard: int) -> Path:
        return output.part / (output.shards[shard].filename + ".tmp")

    def _create(self, output: Output, shard: int) -> File:
        planned = output.shards[shard]
        file = File(self._temporary(output, shard), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            file.prepare(planned.nbytes)
            file.write(np.frombuffer(planned.header, np.uint8), 0)
        except OSError:
            file.close()
            raise
        return file

    def files(self, shard: int) -> list[File]:
        """The file of a shard in each output: as long as it will be, and with its header, from the first call on."""
        with self._lock:
            if shard not in self._files:
                self._files[shard] = [self._create(output, shard) for output in self._outputs]
                self._records[shard] = {}
            return self._files[shard]

    def finish_tensor(self, shard: int, name: str, records: list[dict]) -> None:
        """Take a tensor's record for each output; the shard's last tensor makes the shard whole."""
        self.files(shard)
        with self._lock:
            self._records[shard][name] = records
            if len(self._records[shard]) < len(self._outputs[0].shards[shard].slots):
                return
            files, done = self._files.pop(shard), self._records.pop(shard)
        for number, (output, file) in enumerate(zip(self._outputs, files, strict=True)):
            file.sync()
            file.close()
            order = [slot.name for slot in output.shards[shard].slots]
            record = {name: done[name][number] for name in order}
            write_file(_record_path(output, shard), json.dumps(record).encode())
            os.rename(self._temporary(output, shard), output.part / output.shards[shard].filename)
            sync(output.part)

    def abandon(self) -> None:
        """Close what is open and remove shards that are not whole."""
        for shard, files in self._files.items():
            for output, file in zip(self._outputs, files, strict=True):
                file.close()
                self._temporary(output, shard).unlink(missing_ok=True)
        self._files.clear()


def records(output: Output) -> dict[str, dict]:
    """{tensor: record} of a finished output, in the order of the plan."""
    return {
        name: record
        for shard in range(len(output.shards))
        for name, record in json.loads(_record_path(output, shard).read_text()).items()
    }


def publish(outputs: list[Output], complete: Callable[[Output, dict], None]) -> None:
    """Make every output whole, then rename each to its final name.

    complete(output, records) adds what goes beside the weights to output.part. Killed anywhere in here, the same
    command goes on.
    """
    waiting = [output for output in outputs if output.part.is_dir()]
    for output in waiting:
        complete(output, records(output))
        if len(output.shards) > 1:
            (output.part / "model.safetensors.index.json").write_text(index_text(list(output.shards)), encoding="utf-8")
        for path in output.part.iterdir():
            if path.is_file():
                sync(path)
        sync(output.part)
    for output in waiting:
        move(output.part, output.final)
    for output in reversed(outputs):
        _forget(output.final / RUN)


def _forget(directory: Path) -> None:
    """Remove a record of a run, run.json last: killed in here, the same command goes on."""
    if directory.is_dir():
        for path in sorted(directory.iterdir(), key=lambda path: path.name == "run.json"):
            path.unlink(missing_ok=True)
        directory.rmdir()


def discard(outputs: list[Output]) -> None:
    """Remove what a run that was refused on its data has written: going on would only meet the same data."""
    for output in outputs:
        shutil.rmtree(output.part, ignore_errors=True)
