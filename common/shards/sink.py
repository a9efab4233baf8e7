"""Shard files while they are written: under a temporary name, renamed when they are complete."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.shards.blocks import Writer
from common.shards.buffers import OutputBuffer
from common.shards.direct import File
from common.shards.layout import Output
from common.shards.places import RUN
from common.shards.staging import sync, write_file


def record_path(output: Output, shard: int) -> Path:
    """Where the records of a complete shard's tensors are."""
    return output.part / RUN / f"{output.shards[shard].filename}.json"


class Sink:
    """Open shards of one job's outputs. Nothing else writes tensors."""

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

    def writers(self, task, buffers: list[OutputBuffer], advance: Callable[[int], None]) -> list[Writer]:
        """A writer for a task's slot in each output; `buffers`, at least one an output, are the calling thread's."""
        places = zip(task.slots, self.files(task.shard), buffers, strict=False)
        return [Writer(slot, file, buffer, advance) for slot, file, buffer in places]

    def finish_tensor(self, shard: int, name: str, records: list[dict]) -> None:
        """Take a tensor's record for each output; the shard's last tensor completes it."""
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
            write_file(record_path(output, shard), json.dumps(record).encode())
            os.rename(self._temporary(output, shard), output.part / output.shards[shard].filename)
            sync(output.part)

    def abandon(self) -> None:
        """Close what is open and remove shards that are not complete."""
        for shard, files in self._files.items():
            for output, file in zip(self._outputs, files, strict=True):
                file.close()
                self._temporary(output, shard).unlink(missing_ok=True)
        self._files.clear()
