"""Models on the Hugging Face Hub, described before they are downloaded.

Config, tokenizer and index are small and downloaded first; of each safetensors file only the header is read, by a range
request. What does not fit is refused then, and --dry_run ends there. Files of the older .bin format, which have no such
header, and LoRA adapters, which are small, are downloaded at once.
"""

from dataclasses import replace
from pathlib import Path

from common.errors import DataError
from common.shards.architecture import with_constants
from common.shards.checkpoint import Checkpoint, open_checkpoint
from common.shards.documents import read_json
from common.shards.findings import not_gathered
from common.shards.headers import DTYPE_BYTES, INDEX_NAME, SINGLE_NAME, Tensor, check_index, read_index
from common.shards.hub import NEVER, SMALL, is_hub_id, refuse_unusable, safetensors_files, transport_errors
from common.shards.layout import tensor_bytes
from common.shards.places import check_disk


def _remote_tensors(hub_id: str, revision: str, path: Path) -> list[Tensor]:
    """The tensors of one file as its header on the Hub describes them; `path` is where the file will be.

    Offsets count from the end of the header, which is enough for a plan; the downloaded file's own are checked as any.
    """
    from huggingface_hub import HfApi

    found = HfApi().parse_safetensors_file_metadata(hub_id, path.name, revision=revision)
    tensors = []
    for name, info in found.tensors.items():
        shape = tuple(info.shape)
        sizes = all(type(size) is int and size >= 0 for size in shape)
        if info.dtype not in DTYPE_BYTES or not sizes:
            raise DataError(
                f"tensor {name!r:.200} in {hub_id}/{path.name}: {info.dtype!r:.40} {shape!r:.60} is not read here; "
                "take a version of the model in float16, bfloat16 or float32"
            )
        tensors.append(Tensor(name, info.dtype, shape, path, info.data_offsets[0], tensor_bytes(info.dtype, shape)))
    return sorted(tensors, key=lambda tensor: tensor.offset)


def remote_checkpoint(hub_id: str) -> Checkpoint | None:
    """A checkpoint from remote headers; None for no Hub id, for what is here already, and without headers to read."""
    if not is_hub_id(hub_id):
        return None
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*SMALL], ignore_patterns=[*NEVER]))
        index, config = folder / INDEX_NAME, folder / "config.json"
        weight_map = read_index(index, ".safetensors") if index.is_file() else {}
        paths = [folder / name for name in safetensors_files(folder)]
        if config.is_file() and all(
            path.is_file() for path in paths
        ):  # before the Hub is asked: it may be out of reach
            return None
        # Not list_repo_files(), which tries for half a minute if there is no network.
        files = [file.rfilename for file in HfApi().model_info(hub_id, revision=folder.name).siblings or ()]
        refuse_unusable(hub_id, files)
        if SINGLE_NAME in files and folder / SINGLE_NAME not in paths:  # as headers.read_headers() does
            raise DataError(
                f"{hub_id}: holds both {SINGLE_NAME} and {INDEX_NAME}, and tools disagree on which counts; download "
                "one of the two into a directory, without the other, and give that"
            )
        if not config.is_file():
            return None
        tensors = [tensor for path in paths for tensor in _remote_tensors(hub_id, folder.name, path)]
    except (OfflineModeIsEnabled, HfHubHTTPError, SafetensorsParsingError, *transport_errors(), OSError, ValueError):
        return None  # the download that follows says what is wrong, or brings what has no such header
    if weight_map:
        check_index(index, weight_map, tensors)
    if reason := not_gathered(tensors):
        raise DataError(f"{hub_id}: {reason}")
    settings = read_json(config, strict=False)  # as open_checkpoint() does
    tensors = with_constants(tensors, settings)
    return Checkpoint(hub_id, folder, {tensor.name: tensor for tensor in tensors}, settings, is_remote=True)


def describe_checkpoint(label: str) -> Checkpoint:
    """open_checkpoint(), but the weights of a Hub id stay there until fetch(): `is_remote` says so."""
    return remote_checkpoint(label) or open_checkpoint(label)


def to_download(checkpoints: list[Checkpoint]) -> dict[Path, int]:
    """{where it will be: bytes} of the weights that are still on the Hub."""
    return {
        checkpoint.path: sum(tensor.nbytes for tensor in checkpoint.tensors.values() if not tensor.path.is_file())
        for checkpoint in checkpoints
        if checkpoint.is_remote
    }


def fetch(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights on this machine: downloaded if they are still on the Hub.

    Raises DataError if what came is not what the headers said (the model was changed in between).
    """
    if not checkpoint.is_remote:
        return checkpoint
    check_disk(to_download([checkpoint]))
    local = open_checkpoint(checkpoint.label)

    def seen(one: Checkpoint) -> set:
        return {replace(tensor, path=Path(tensor.path.name), offset=0) for tensor in one.tensors.values()}

    if seen(local) != seen(checkpoint):
        raise DataError(f"{checkpoint.label}: changed on the Hub while it was being downloaded; run the command again")
    return local
