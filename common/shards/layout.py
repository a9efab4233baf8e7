"""Output files, planned to the last byte from headers alone."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.shards.headers import DTYPE_BYTES, SINGLE_NAME
from common.shards.staging import part_of


@dataclass(frozen=True)
class Slot:
    """Where one tensor goes in an output file: `nbytes` at `offset`, counted from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file, known to the last byte before anything is written."""

    filename: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """('F16', (2, 3)) -> 12."""
    total = DTYPE_BYTES[dtype]
    for dim in shape:
        total *= dim
    return total


def partition(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
    """Names cut greedily, in order, into groups of at most max_shard_size bytes (a larger tensor is alone).

    partition({"a": 3, "b": 3, "c": 9, "d": 1}, 6) -> [["a", "b"], ["c"], ["d"]]
    """
    groups, filled = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def lay_out(filename: str, tensors: list[tuple[str, str, tuple[int, ...]]]) -> Shard:
    """The file that holds (name, dtype, shape) tensors: header and offsets as safetensors' own save_file has them.

    Wider dtypes come first, otherwise the order given is kept: then every tensor is aligned to its element
    size, which torch needs in order to view it.
    """
    tensors = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]])
    entries, position = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned too; safetensors pads by spaces as well
    header = len(text).to_bytes(8, "little") + text
    slots = (
        Slot(name, dtype, shape, len(header) + entries[name]["data_offsets"][0], tensor_bytes(dtype, shape))
        for name, dtype, shape in tensors
    )
    return Shard(filename, header, tuple(slots))


def plan_shards(tensors: list[tuple[str, str, tuple[int, ...]]], max_shard_size: int) -> list[Shard]:
    """The output files for (name, dtype, shape) tensors in base order."""
    described = {tensor[0]: tensor for tensor in tensors}
    groups = partition({n: tensor_bytes(d, s) for n, d, s in tensors}, max_shard_size)
    if len(groups) == 1:
        return [lay_out(SINGLE_NAME, [described[name] for name in groups[0]])]
    count = len(groups)
    return [
        lay_out(f"model-{i:05}-of-{count:05}.safetensors", [described[name] for name in group])
        for i, group in enumerate(groups, 1)
    ]


def slots_of(shards: Sequence[Shard]) -> Iterator[tuple[int, Slot]]:
    """(number of its shard, slot) of every tensor, in order."""
    return ((number, slot) for number, shard in enumerate(shards) for slot in shard.slots)


def index_text(shards: list[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {slot.name: shard.filename for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


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
