"""Hugging Face Hub ids to local directories."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import DataError, reason_of
from common.shards import bins
from common.shards.companions import COMPANIONS
from common.shards.findings import ADAPTER_FILES, MODEL_FILES, what_file, what_is_there
from common.shards.headers import INDEX_NAME, SINGLE_NAME, read_index
from common.shards.places import check_disk

SMALL = (INDEX_NAME, bins.INDEX_NAME, "config.json", "task_vector.json", "adapter_config.json", *COMPANIONS)
_TEMPLATES = "additional_chat_templates"
# No folder but that of the templates: patterns of names match across folders, and there is no other way to say "but".
_FOLDERS = tuple(f"{_TEMPLATES[:i]}{rest}" for i, letter in enumerate(_TEMPLATES) for rest in ("/*", f"[!{letter}]*/*"))
NEVER = ("consolidated*", "*.py", *_FOLDERS)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_hub_id(path: str) -> bool:
    """Whether there is nothing at a path and it could be a Hub id: 'org/name'."""
    return not os.path.lexists(path) and bool(_HUB_ID.fullmatch(path)) and not path.startswith(".")


def refuse_unusable(hub_id: str, files: list[str]) -> None:
    """DataError for a repository of these files if they are no model and no adapter, in the words for a directory."""
    top = [name for name in files if "/" not in name]
    if not set(top) & set(MODEL_FILES):
        if any(name.startswith("adapter_") for name in top):
            return
        with TemporaryDirectory(prefix="listing_") as place:  # empty files of the same names, to look at
            for name in files:
                if ".." in Path(name).parts or Path(name).is_absolute():  # it is a stranger's list
                    continue
                (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(place) / name).touch()
            raise DataError(f"{hub_id}: {what_is_there(Path(place)).replace(place, hub_id)}")
    if "config.json" not in top:
        raise DataError(
            f"{hub_id}: no config.json in it; download the weights and add the config.json of the model they come from"
        )


def safetensors_files(folder: Path) -> list[str]:
    """The names of the files that a model is read from, by its index where it has one: ["model.safetensors"]."""
    index = folder / INDEX_NAME
    return sorted(set(read_index(index, ".safetensors").values())) if index.is_file() else [SINGLE_NAME]


def bin_files(folder: Path) -> list[str]:
    """The same of a model in .bin files: ["pytorch_model.bin"]."""
    index = folder / bins.INDEX_NAME
    return sorted(set(read_index(index, ".bin").values())) if index.is_file() else [bins.SINGLE_NAME]


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub lets through of its HTTP library where the network fails: no OSError, none of its own."""
    from httpx2 import TransportError

    return ConnectionError, TransportError


def download(hub_id: str) -> Path:
    """The local snapshot of a Hub model: configs, tokenizer, and of the weights the files that are read.

    Those are safetensors, or else .bin, or, where there is no model, an adapter's.

    Raises DataError where it cannot be had: no such model, no access, no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, LocalEntryNotFoundError

    def wanted(names: Iterable[str]) -> dict:
        return {"allow_patterns": [*SMALL, *map(escape, names)], "ignore_patterns": [*NEVER]}

    try:
        folder = Path(snapshot_download(hub_id, **wanted(())))
        folder = Path(snapshot_download(hub_id, **wanted(safetensors_files(folder))))
        if any((folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
            return folder
        # One kind after the other: a repository that has several would otherwise be downloaded several times over.
        for names in (bin_files(folder), *([name] for name in ADAPTER_FILES)):
            if not all((folder / name).is_file() for name in names):
                with suppress(DryRunError):  # the Hub is out of reach, and the cache may have them
                    files = snapshot_download(hub_id, dry_run=True, **wanted(names))
                    check_disk({folder: sum(file.file_size or 0 for file in files if file.will_download)})
                folder = Path(snapshot_download(hub_id, **wanted(names)))
            if any((folder / name).is_file() for name in names):
                break
        return folder
    except (LocalEntryNotFoundError, *transport_errors()) as error:
        reason = f"it is in no local cache and the Hub cannot be reached ({type(error).__name__})"
    except (HFValidationError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # of this machine: the disk is full, no permission
            raise
        reason = f"the Hub answered: {reason_of(error):.120}"
    raise DataError(
        f"{hub_id!r}: no such directory, and as a Hugging Face Hub id: {reason}; "
        "check the path, or the id and the network"
    )


def local_directory(path: str) -> Path:
    """A path that is a directory is that directory; otherwise `org/name` is a Hub id, downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if is_hub_id(path):
        return download(path)
    if Path(path).exists():
        raise DataError(f"{path}: {what_file(Path(path))}")
    raise DataError(f"{path}: no such directory; check the path, or give a Hugging Face Hub id such as org/name")
