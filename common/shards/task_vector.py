"""Task vectors: their base, their hashes, task_vector.json."""

import re
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from common.errors import DataError
from common.shards.checkpoint import Checkpoint
from common.shards.documents import read_record, write_json
from common.shards.headers import DTYPE_NAMES
from common.shards.matching import Match, match
from common.shards.remote import describe_checkpoint

NAME = "task_vector.json"
HASH = "xxh3_128"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # what would garble a line of ours; other blanks are in people's paths


@dataclass(frozen=True)
class TaskVector:
    """A task vector's checkpoint, the base it was extracted from, and {tensor: {"base": hash, "vector": hash}}."""

    checkpoint: Checkpoint
    base_model_path: str
    hashes: dict[str, dict[str, str]]


def whereabouts(checkpoint: Checkpoint) -> str:
    """An absolute path, or the Hub id as it was given."""
    return str(Path(checkpoint.label).resolve()) if Path(checkpoint.label).is_dir() else checkpoint.label


def write_task_vector_json(directory: Path, finetuned: Checkpoint, base: Checkpoint, dtype: str, records: dict) -> None:
    """Write task_vector.json from the records of an extraction."""
    content = {
        "finetuned_model_path": whereabouts(finetuned),
        "base_model_path": whereabouts(base),
        "dtype": DTYPE_NAMES[dtype],
        "hash": HASH,
        "tensors": {name: {"base": r["base"], "vector": r["written"]} for name, r in records.items()},
    }
    write_json(directory / NAME, content)


def write_pruned_vector_json(directory: Path, vector: TaskVector, first: TaskVector, records: dict) -> None:
    """task_vector.json of a pruned task vector: its own hashes, and those of the base, which all vectors share, under
    the names that the `first` has and every output with it."""
    content = read_record(vector.checkpoint.path / NAME)
    content["tensors"] = {n: {"base": first.hashes[n]["base"], "vector": r["written"]} for n, r in records.items()}
    write_json(directory / NAME, content)


def read_task_vector(checkpoint: Checkpoint) -> TaskVector:
    """The task vector in a checkpoint. Raises DataError if there is no undamaged task_vector.json for its tensors."""
    path = checkpoint.path / NAME
    if not path.is_file():
        raise DataError(
            f"{checkpoint.label}: no {NAME} in it, so it is not a task vector; make one with extract_task_vector_7b.py"
        )
    content = read_record(path)
    hashes, base = content.get("tensors"), content.get("base_model_path")
    is_ours = (
        isinstance(hashes, dict) and isinstance(base, str) and not _CONTROL.search(base) and content.get("hash") == HASH
    )
    if not is_ours or not all(
        isinstance(h, dict) and isinstance(h.get("base"), str) and isinstance(h.get("vector"), str)
        for h in hashes.values()
    ):
        raise DataError(f"{path}: not as extract_task_vector_7b.py writes it; extract the vector again")
    if hashes.keys() != checkpoint.tensors.keys():  # of a tensor without a hash nobody would notice damage
        name = sorted(hashes.keys() ^ checkpoint.tensors.keys())[0]
        raise DataError(f"tensor {name!r}: in only one of {path} and the weights beside it; extract the vector again")
    return TaskVector(checkpoint, base, hashes)


def open_vectors(paths: list[str], skip: tuple[str, ...] = ()) -> list[TaskVector]:
    """The task vectors, all of one base, weights of Hub ids still there; see remote.py.

    Raises DataError that names the first tensor that differs.
    """
    vectors = [read_task_vector(describe_checkpoint(path)) for path in paths]
    first = vectors[0]
    for other in vectors[1:]:
        pairs = match(first.checkpoint, other.checkpoint, skip).pairs  # names may differ: two copies of one base
        for name, hashes in first.hashes.items():
            theirs = pairs[name].name if name in pairs else name
            if hashes["base"] != other.hashes.get(theirs, hashes)["base"]:
                raise DataError(
                    f"tensor {name!r}: {first.checkpoint.label} and {other.checkpoint.label} were extracted from "
                    "different bases; extract both from the same one"
                )
    return vectors


def refuse_untied(base: Checkpoint, vector: TaskVector, matched: Match) -> None:
    """Raise DataError for a head of its own that would be dropped as a copy: by its hashes it is none.

    base: the model whose names the outputs have, and in which it is tied.
    """
    for name, extras in matched.equal.items():
        for extra in extras:
            if vector.hashes[extra.name] != vector.hashes[matched.pairs[name].name]:
                raise DataError(
                    f"tensor {extra.name!r} in {extra.path} differs from {matched.pairs[name].name!r}, to which "
                    f"{base.label} ties it; prune it onto the base that it was extracted from, or leave it out with "
                    f"--skip {escape(extra.name)!r}"
                )


def open_base(vectors: list[TaskVector], path: str | None) -> Checkpoint:
    """The base model, as open_vectors() opens. Raises DataError, naming the flag, if the recorded one is missing."""
    if path:
        return describe_checkpoint(path)
    recorded = vectors[0].base_model_path
    try:
        return describe_checkpoint(recorded)
    except DataError as error:
        raise DataError(
            f"{error} (recorded in {vectors[0].checkpoint.label}; say where it is now with --base_model_path)"
        ) from None
