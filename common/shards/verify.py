"""Is a directory still what was written? Hash every tensor and compare.

Every script that writes weights leaves a hash of each tensor beside them, in convert_report.json, task_vector.json,
prune_report.json or merge_report.json. Checked here: each tensor's bytes, that none is missing and none was added, and
every header. What the record says of other directories, the inputs, is known only as far as these are verified too.
"""

from pathlib import Path

from common.errors import DataError
from common.shards import bins, task_vector
from common.shards.checkpoint import Checkpoint
from common.shards.documents import read_record, write_json
from common.shards.hashing import tensor_hashes
from common.shards.headers import DTYPE_NAMES, Tensor, read_headers
from common.shards.places import whole_path

# {file: the key of a tensor's hash; None where the hash itself is the value}
CONVERT_REPORT, MERGE_REPORT, PRUNE_REPORT = "convert_report.json", "merge_report.json", "prune_report.json"
RECORDS = {MERGE_REPORT: None, PRUNE_REPORT: "hash", task_vector.NAME: "vector", CONVERT_REPORT: None}


def write_convert_report(directory: Path, model: Checkpoint, dtype: str, records: dict[str, dict]) -> None:
    """convert_report.json from the records of a conversion: from what, to which dtype, a hash of every tensor."""
    content = {
        "model_path": task_vector.whereabouts(model),
        "dtype": DTYPE_NAMES[dtype],
        "hash": task_vector.HASH,
        "tensors": {name: record["written"] for name, record in records.items()},
    }
    write_json(directory / CONVERT_REPORT, content)


def recorded_hashes(path: Path) -> dict[str, str]:
    """{tensor: hash} of one record. Raises DataError if it is not as our scripts write it."""
    content, key = read_record(path), RECORDS[path.name]
    tensors = content.get("tensors")
    entries = tensors.items() if isinstance(tensors, dict) else ()
    if key is None:
        hashes = dict(entries)
    else:
        hashes = {name: entry.get(key) if isinstance(entry, dict) else None for name, entry in entries}
    if not hashes or not all(isinstance(digest, str) for digest in hashes.values()):
        raise DataError(f"{path}: holds no hash of every tensor, so it is damaged; write the directory again")
    return hashes


def recorded_hashes_of(checkpoint: Checkpoint) -> dict[str, str]:
    """{tensor: hash} as recorded when a checkpoint was written; empty where nothing was, or not of these tensors."""
    for name in RECORDS:
        path = checkpoint.path / name
        if path.is_file() and (hashes := recorded_hashes(path)).keys() == checkpoint.tensors.keys():
            return hashes
    return {}


def hashes_as_recorded(checkpoint: Checkpoint) -> dict[str, str]:
    """The same, and empty where a file of weights is newer than each record: nobody has said what is in it.

    Records are written last, so a directory that was written anew with the same bytes is the same by these.
    """
    records = [path for name in RECORDS if (path := checkpoint.path / name).is_file()]
    weights = {tensor.path for tensor in checkpoint.tensors.values() if tensor.path.is_file()}  # not if on the Hub
    last = max((path.stat().st_mtime_ns for path in records), default=0)
    is_newer = any(path.stat().st_mtime_ns > last for path in weights)
    return {} if is_newer else recorded_hashes_of(checkpoint)


def open_directory(label: Path | str, is_known: bool = False) -> tuple[list[Tensor], dict[Path, dict[str, str]]]:
    """(tensors, {record: {tensor: hash}}) of a directory to verify, with the same names in all of them.

    is_known: whether another directory's record has hashes of an input, which this may be; then it needs no record.
    """
    directory = Path(label)
    if not directory.is_dir():
        raise DataError(f"{label}: no such directory; give one that convert, extract, prune or merge wrote")
    paths = [directory / name for name in RECORDS if (directory / name).is_file()]
    if not paths and not is_known:
        raise DataError(
            f"{label}: no {', '.join(RECORDS)} in it, so nothing says what its bytes were; only what "
            "convert, extract, prune and merge wrote can be verified"
        )
    tensors = read_headers(directory) or bins.read_headers(directory)
    if tensors is None:  # a record alone: an interrupted copy, or a clone without its large files
        beside = f" beside {paths[0].name}" if paths else ""
        raise DataError(f"{label}: no weights{beside}; write or copy the directory again")
    records = {path: recorded_hashes(path) for path in paths}
    for path, hashes in records.items():
        _check_names(tensors, path, hashes)
    return tensors, records


def _check_names(tensors: list[Tensor], path: Path, hashes: dict[str, str]) -> None:
    for tensor in tensors:
        if tensor.name not in hashes:
            raise DataError(
                f"tensor {tensor.name!r} in {tensor.path}: not in {path.name}, so it was added later; "
                "write or copy the directory again"
            )
    missing = hashes.keys() - {tensor.name for tensor in tensors}
    for name in hashes:
        if name in missing:
            raise DataError(
                f"tensor {name!r}: in {path} but not in the weights beside it; write or copy the directory again"
            )


def check_directory(label: Path | str, is_known: bool = False) -> tuple[str, dict[str, str]]:
    """Read what a script wrote back -> (what to tell the user, {tensor: hash}).

    check_directory("models/merged") -> ("models/merged: 291 tensors, 14.483 GB, every byte of them as it was written",
    …). is_known: see open_directory. Raises DataError that names the first damaged tensor and its file.
    """
    tensors, records = open_directory(label, is_known)
    # All tensors once, whatever number of records there is: reading is what takes the time.
    found = tensor_hashes(tensors, f"verify {Path(label).name}")
    for path, hashes in records.items():
        damaged = [tensor for tensor in tensors if found[tensor.name] != hashes[tensor.name]]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            raise DataError(
                f"tensor {damaged[0].name!r} in {damaged[0].path}{more}: not the bytes that {path.name} recorded; "
                "write or copy the directory again"
            )
    size = f"{label}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors) / 1e9:.3f} GB"
    return (
        f"{size}, {'every byte of them as it was written' if records else 'read; it has no record of its own'}",
        found,
    )


def recorded_inputs(directory: Path) -> dict[str, dict[str, str]]:
    """{input, as the records of a directory name it: {tensor: hash}, empty where none was recorded}."""
    found = {}
    for name in RECORDS:
        content = read_record(directory / name) if (directory / name).is_file() else {}
        if content.get("base_model_path") and RECORDS[name]:  # where an entry is more than a hash
            hashes = {tensor: entry.get("base") for tensor, entry in content["tensors"].items()}
            found[str(content["base_model_path"])] = hashes
        vector = "vector_path" if "vector_path" in content else "vector"  # reports of earlier versions lack it
        found |= {str(content[key]): {} for key in ("finetuned_model_path", "model_path", vector) if content.get(key)}
        models = content.get("models")
        found |= {str(model): {} for model in (models if isinstance(models, dict | list) else ())}
    return found


def unknown_inputs(directory: Path, verified: dict[str, dict[str, str]]) -> list[str]:
    """A line about the inputs of a verified directory, of which nothing is known but what `verified` says.

    verified: {directory: {tensor: hash}} of all that were read back. A recorded hash finds its directory wherever that
    is now.
    """
    here, unknown = [], []
    for name, hashes in recorded_inputs(directory).items():
        same = [label for label, found in verified.items() if hashes and hashes.items() <= found.items()]
        if same:
            here.append(f"its base is {same[0]}, verified too")
        elif hashes:
            unknown.append(f"{name} (by its hashes none of those verified here)")
        elif whole_path(name) not in map(whole_path, verified):
            unknown.append(name)
    if unknown:
        here.append(f"not known: whether its inputs are as they were: {', '.join(unknown)}")
    return here


def verify(labels: list[Path | str]) -> None:
    """Check one directory after the other and print a line for each, then what is not known of their inputs.

    Raises DataError at the first that is damaged.
    """
    verified = {}
    # Those without a record last: of a base that none of our scripts wrote, the vectors extracted from it know the
    # hashes.
    for label in sorted(labels, key=lambda label: not any((Path(label) / name).is_file() for name in RECORDS)):
        is_known = any(hashes for known in verified for hashes in recorded_inputs(Path(known)).values())
        line, verified[str(label)] = check_directory(label, is_known)
        print(line, flush=True)
    for label in labels:
        for line in unknown_inputs(Path(label), verified):
            print(f"{label}: {line}", flush=True)
