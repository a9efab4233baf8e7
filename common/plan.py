"""Every decision and refusal, made from headers alone.

Which tensors belong together, which are tied, how the output is cut into shards, whether there is
room for it. Nothing here reads a weight or writes a byte.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import Checkpoint, says_tied
from common.errors import DataError
from common.headers import DTYPE_BYTES, FLOAT_DTYPES, SINGLE_NAME, Tensor

EMBEDDING_ENDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
HEAD_ENDINGS = ("lm_head.weight", "embed_out.weight")


# --- matching -----------------------------------------------------------------------------------


def _ends(names, endings: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.endswith(endings)), None)


def tied_embedding(checkpoint: Checkpoint, head: str) -> Tensor | None:
    """The embedding that stands in for the output head `head`, or None where they are not tied."""
    embedding = _ends(checkpoint.tensors, EMBEDDING_ENDINGS)
    if not head.endswith(HEAD_ENDINGS) or embedding is None or not says_tied(checkpoint):
        return None
    return checkpoint.tensors[embedding]


def mask_names(base: Checkpoint) -> dict[str, str]:
    """{tensor: the name its random mask is drawn under}: a tied head draws under its embedding's name."""
    names = {name: name for name in base.tensors}
    head, embedding = _ends(names, HEAD_ENDINGS), _ends(names, EMBEDDING_ENDINGS)
    if head and embedding and base.tensors[head].shape == base.tensors[embedding].shape and says_tied(base):
        names[head] = embedding
    return names


def _check_shapes(base: Checkpoint, other: Checkpoint, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape == theirs.shape:
        return
    line = f"tensor {mine.name!r} is {list(theirs.shape)} in {other.label} but {list(mine.shape)} in {base.label}; "
    if mine.name.endswith(EMBEDDING_ENDINGS + HEAD_ENDINGS) and mine.shape[1:] == theirs.shape[1:]:
        raise DataError(
            f"{line}the vocabularies differ: bring {other.label} to {mine.shape[0]} rows with "
            f"transformers' resize_token_embeddings({mine.shape[0]}) and save it, or take another model"
        )
    raise DataError(f"{line}is {other.label} a fine-tuned model of {base.label}?")


def check_floats(checkpoint: Checkpoint) -> None:
    """Refuse parameters in a dtype without exact arithmetic here (float64, 8 bits)."""
    for tensor in checkpoint.tensors.values():
        if tensor.is_parameter and tensor.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"tensor {tensor.name!r} is {tensor.dtype} in {checkpoint.label}; needed is float16, "
                "bfloat16 or float32: take an unquantised version of the model"
            )
    if "quantization_config" in checkpoint.config:
        raise DataError(
            f"{checkpoint.label}: config.json has a quantization_config; take an unquantised version of the model"
        )


def _check_kinds(base: Checkpoint, other: Checkpoint) -> None:
    """Refuse a tensor that is a parameter (floating point) in one model and a buffer in the other."""
    for name, theirs in other.tensors.items():
        mine = base.tensors.get(name, theirs)
        if mine.is_parameter != theirs.is_parameter:
            raise DataError(
                f"tensor {name!r} is {theirs.dtype} in {other.label} but {mine.dtype} in {base.label}; "
                "take versions of both models in floating point"
            )


def match(base: Checkpoint, other: Checkpoint) -> dict[str, Tensor]:
    """{name: other's tensor} for every parameter of base, matched by name; tied heads are resolved.

    Raises DataError that names what is missing, left over, or of another shape.
    """
    check_floats(other)
    _check_kinds(base, other)
    pairs = {}
    for name, mine in base.tensors.items():
        if not mine.is_parameter:
            continue
        theirs = other.tensors.get(name) or tied_embedding(other, name)
        if theirs is None:
            raise DataError(
                f"tensor {name!r} is in {base.label} but not in {other.label}; "
                f"is {other.label} a fine-tuned model of {base.label}?"
            )
        _check_shapes(base, other, mine, theirs)
        pairs[name] = theirs
    for name, theirs in other.tensors.items():
        if name not in base.tensors and theirs.is_parameter and not tied_pair(base, other, name):
            raise DataError(
                f"tensor {name!r} is in {other.label} but not in {base.label}; "
                f"is {other.label} a fine-tuned model of {base.label}?"
            )
    return pairs


def tied_pair(base: Checkpoint, other: Checkpoint, head: str) -> tuple[Tensor, Tensor] | None:
    """(head, embedding) of `other` when it spells out a head that both models tie; they must hold the same bytes."""
    if tied_embedding(base, head) is None:
        return None
    embedding = tied_embedding(other, head)
    if embedding is None or embedding.shape != other.tensors[head].shape:
        return None
    return other.tensors[head], embedding


def must_be_equal(base: Checkpoint, other: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors of `other` that are only dropped as tied if their bytes are equal."""
    extra = [name for name in other.tensors if name not in base.tensors and other.tensors[name].is_parameter]
    return [pair for name in extra if (pair := tied_pair(base, other, name))]


# --- shards -------------------------------------------------------------------------------------


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
    """Names cut greedily, in order, into groups of at most max_shard_size bytes (one larger tensor stands alone).

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

    Wider dtypes go first, otherwise the order given is kept: then every tensor is aligned to its element
    size, which torch needs in order to view it.
    """
    tensors = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]])
    entries, position = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
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


def index_text(shards: list[Shard]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {slot.name: shard.filename for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


# --- where it goes ------------------------------------------------------------------------------


def check_places(inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse outputs that are, hold, or lie inside an input or one another, or that are or hold the working directory."""
    places = [path.resolve() for path in outputs]
    for i, place in enumerate(places):
        if place in (Path.cwd(), *Path.cwd().parents):
            raise DataError(
                f"{outputs[i]}: is the working directory or holds it; give the output a directory of its own"
            )
        for other in [path.resolve() for path in inputs] + places[:i]:
            if place == other or other in place.parents or place in other.parents:
                raise DataError(f"{outputs[i]}: output and {other} overlap; give the output a directory of its own")


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path`, or itself, that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(needs: dict[Path, int]) -> None:
    """Refuse unless every file system has room for the bytes that are still to be written to it."""
    by_device: dict[int, list] = {}
    for output, nbytes in needs.items():
        parent = existing_parent(output)
        entry = by_device.setdefault(os.stat(parent).st_dev, [parent, 0])
        entry[1] += nbytes
    for parent, nbytes in by_device.values():
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise DataError(
                f"{parent}: {nbytes / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free; "
                "free some space or write elsewhere"
            )
