"""A checkpoint directory: tensors, config, companion files."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.shards import bins, headers
from common.shards.architecture import with_constants
from common.shards.documents import read_json
from common.shards.headers import DTYPE_NAMES, Tensor
from common.shards.hub import local_directory

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


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
    if not tensors:
        raise DataError(
            f"{label}: no model.safetensors, no model.safetensors.index.json, no pytorch_model.bin in it; "
            "point at the directory that holds the weights"
        )
    config = path / "config.json"
    if not config.is_file():
        raise DataError(f"{label}: no config.json in it; copy it from where the model came from")
    settings = read_json(config)
    tensors = with_constants(tensors, settings)
    return Checkpoint(label, path.resolve(), {tensor.name: tensor for tensor in tensors}, settings)


def config_with_dtype(config: dict, dtype: str) -> str:
    """config.json's text with `dtype` (e.g. 'F16'), nested configs included: from_pretrained believes it."""

    def renamed(section: dict) -> dict:
        changed = {k: renamed(v) if isinstance(v, dict) and k.endswith("_config") else v for k, v in section.items()}
        had_old_key = changed.pop("torch_dtype", None) is not None
        if "dtype" in changed or had_old_key or section is config:
            changed["dtype"] = DTYPE_NAMES[dtype]
        return changed

    return json.dumps(renamed(config), indent=2, ensure_ascii=False) + "\n"


def companion_files(directory: Path) -> list[Path]:
    """Tokenizer, chat template and generation config of a model directory; never code."""
    found = {path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, following symbolic links (the Hub's cache is made of links)."""
    for path in companion_files(source):
        shutil.copyfile(path, target / path.name)
