"""A checkpoint directory: tensors, config, companion files."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.shards import bins, headers
from common.shards.architecture import with_constants
from common.shards.companions import check_companions, code_note, without_code
from common.shards.documents import read_json
from common.shards.findings import not_gathered, what_is_there
from common.shards.headers import DTYPE_NAMES, Tensor
from common.shards.hub import local_directory


@dataclass(frozen=True)
class Checkpoint:
    """A model directory as its headers describe it. `label` is what the user typed."""

    label: str
    path: Path
    tensors: dict[str, Tensor]
    config: dict
    is_remote: bool = False  # its weights are still on the Hub: see remote.py

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(label: str) -> Checkpoint:
    """The checkpoint at a path or Hub id: every header read and checked, no weight read."""
    path = local_directory(label)
    tensors = headers.read_headers(path)
    if tensors is None:
        tensors = bins.read_headers(path)
    if tensors is None:
        raise DataError(f"{label}: {what_is_there(path)}")
    if not tensors:
        raise DataError(f"{label}: its weight files hold no tensor; download or save the model again")
    if reason := not_gathered(tensors):
        raise DataError(f"{label}: {reason}")
    config = path / "config.json"
    if not config.is_file():
        raise DataError(f"{label}: no config.json in it; copy it from where the model came from")
    check_companions(path)
    settings = read_json(config, strict=False)
    described = {tensor.name: tensor for tensor in with_constants(tensors, settings)}
    return Checkpoint(label, path.resolve(), described, settings)


def config_with_dtype(config: dict, dtype: str | None) -> str:
    """config.json's text with `dtype` (e.g. 'F16'; None: as it was), nested configs included.

    from_pretrained loads in the dtype that it finds there.

    Left out are code that is not copied (see without_code) and a quantization_config, which is null or {} where weights
    are written: check_floats has refused any other.
    """

    def renamed(section: dict) -> dict:
        changed = {k: renamed(v) if isinstance(v, dict) and k.endswith("_config") else v for k, v in section.items()}
        had_old_key = changed.pop("torch_dtype", None) is not None
        if "dtype" in changed or had_old_key or section is kept:
            changed["dtype"] = DTYPE_NAMES[dtype]
        return changed

    kept = {key: value for key, value in without_code(config).items() if key != "quantization_config"}
    return json.dumps(renamed(kept) if dtype else kept, indent=2, ensure_ascii=False) + "\n"


def code_notes(*checkpoints: Checkpoint) -> list[str]:
    """A line for each model that brings code along, which is never run."""
    notes = [code_note(checkpoint.config, checkpoint.path, checkpoint.label) for checkpoint in checkpoints]
    return [note for note in notes if note]
