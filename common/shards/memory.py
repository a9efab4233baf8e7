"""A model in memory as a sink: what a job would write to files goes into its tensors."""

from collections.abc import Callable, Mapping

import numpy as np

from common.shards.headers import DTYPE_BYTES, DTYPE_NAMES

_SIGNED = {2: np.int16, 4: np.int32}  # torch takes signed integers from numpy in every version


class TensorWriter:
    """The elements of one tensor in memory, filled in order: a blocks.Writer without a file."""

    def __init__(self, target, dtype: str, advance: Callable[[int], None]):
        self._flat, self._dtype, self._advance = target.view(-1), dtype, advance
        self._signed = np.dtype(_SIGNED[DTYPE_BYTES[dtype]])
        self._block, self._start, self._held = np.empty(0, self._signed), 0, 0

    def room(self, start: int, stop: int) -> np.ndarray:
        """Where to put elements start:stop, as bits; valid until the next call, in the tensor by flush() at the
        latest."""
        self.flush()
        self._advance((stop - start) * self._signed.itemsize)
        if self._block.size < stop - start:
            self._block = np.empty(stop - start, self._signed)
        self._start, self._held = start, stop - start
        return self._block[: self._held].view(f"u{self._signed.itemsize}")

    def flush(self) -> None:
        """Copy what is held into the tensor, in its own dtype and on its own device."""
        import torch

        if self._held:
            bits = torch.from_numpy(self._block[: self._held]).view(getattr(torch, DTYPE_NAMES[self._dtype]))
            # First what a file would hold, then the model's dtype: the roundings of writing and of loading, in that
            # order.
            self._flat[self._start : self._start + self._held].copy_(bits)
        self._held = 0


class MemorySink:
    """Contiguous tensors {name: torch.Tensor, float16, bfloat16 or float32, any device} that are filled in place.

    Has the two methods of sink.Sink that workers call; nothing touches the disk.
    """

    def __init__(self, tensors: Mapping[str, object]):
        self._tensors = tensors

    def writers(self, task, buffers: list, advance: Callable[[int], None]) -> list[TensorWriter]:
        """A writer for the task's one output; `buffers` are for files."""
        (slot,) = task.slots
        return [TensorWriter(self._tensors[task.name], slot.dtype, advance)]

    def finish_tensor(self, shard: int, name: str, records: list[dict]) -> None:
        """A tensor is whole; there is nothing to rename, and no one to keep its record for."""
