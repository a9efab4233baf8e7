"""What a directory without usable weights does hold, and what to do about it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.shards import bins
from common.shards.headers import INDEX_NAME, SINGLE_NAME, Tensor
from common.shards.places import RUN

_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})(\.safetensors|\.bin)")
# What a model's weights are read from, and an adapter's.
MODEL_FILES = (SINGLE_NAME, INDEX_NAME, bins.SINGLE_NAME, bins.INDEX_NAME)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_UNFINISHED = (
    "*.incomplete",
    "*.part",
    "*.aria2",
    "*.crdownload",
    "*.download",
    ".cache/huggingface/download/*.incomplete",
)
_ZERO = ("zero_to_fp32.py", "global_step*", "*zero_pp_rank_*", "*mp_rank_*_model_states.pt")
# Beside models, never one.
_NOT_MODELS = (
    "consolidated",
    "training_args",
    "optimizer",
    "scheduler",
    "rng_state",
    "openvino",
    "pytorch_lora",
    "adapter",
)
_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.rar")
_OTHERS = {
    "consolidated*.safetensors": "the weights as Mistral first published them",
    "consolidated*.pth": "the weights as Meta first published them",
    "tf_model*.h5": "TensorFlow weights",
    "flax_model*.msgpack": "Flax weights",
    "*.ckpt*": "a training checkpoint",
    "*.onnx": "an ONNX model",
    "onnx/*.onnx": "an ONNX model",
    "openvino*.bin": "an OpenVINO model",
    "*.npz": "MLX or NumPy weights",
    "*.nemo": "a NeMo archive",
    "latest_checkpointed_iteration.txt": "a Megatron checkpoint",
    "*.pt": "PyTorch files under another name",
    "*.pth": "PyTorch files under another name",
}


def _names(paths: list[Path]) -> str:
    """[a, b, c, d] -> "a, b, c, …"."""
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _glob(directory: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern)})


def has_weights(directory: Path) -> bool:
    """Whether a directory holds what open_checkpoint would read."""
    return any((directory / name).is_file() for name in MODEL_FILES)


def what_is_there(directory: Path) -> str:
    """Why a directory is not a model, by what is in it: "holds x; do y".

    what_is_there(Path("adapter")) -> "holds a LoRA adapter (adapter_config.json), not a model; …"
    """
    # The first that finds something speaks: what is certain (files of ours, of PEFT, of DeepSpeed) before guesses from
    # names, and a directory further down only where nothing here says what it is.
    looks = (
        _job,
        _dangling,
        _cache,
        _adapter,
        _shards,
        _variant,
        _unfinished,
        _zero,
        _fsdp,
        _gguf,
        _archive,
        _images,
        _deeper,
        _other,
    )
    for look in looks:
        found = next(look(directory), None)
        if found:
            return found
    if not any(directory.iterdir()):
        return "an empty directory; point at the one that holds the weights"
    if (directory / "config.json").is_file():
        return (
            "a config.json but no weights (model.safetensors, pytorch_model.bin, or an index of several); download "
            "those too"
        )
    return (
        "no model.safetensors, no model.safetensors.index.json, no pytorch_model.bin in it; "
        "point at the directory that holds the weights"
    )


def _job(directory: Path) -> Iterator[str]:
    if (directory / RUN / "run.json").is_file():
        yield "left by a job of these scripts that has not finished; run its command again, then point at its output"
    elif (directory / ".part").is_dir():
        yield "a job of these scripts that writes there has not finished; run its command again"


def _cache(directory: Path) -> Iterator[str]:
    """Of the Hub: its root, one model of it, or that model's snapshots."""
    root = directory.parent if directory.name == "snapshots" else directory
    if root.name.startswith("models--"):
        snapshots = [path for path in _glob(root / "snapshots", "*") if has_weights(path)]
        model = root.name.removeprefix("models--").replace("--", "/", 1)
        if snapshots:
            yield f"a model's folder in the Hub's cache; point at {snapshots[-1]}, or give the id {model}"
        else:
            yield f"a model's folder in the Hub's cache, and no snapshot in it holds weights; give the id {model}"
    if directory.parent.name == "snapshots":
        model = directory.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        yield f"a snapshot in the Hub's cache whose weights have not been downloaded; give the id {model}"
    models = _glob(directory, "models--*", "hub/models--*")
    if models:
        first = models[0].name.removeprefix("models--").replace("--", "/", 1)
        yield f"the Hub's cache of {len(models)} model(s); give a model's id, such as {first}"


def _dangling(directory: Path) -> Iterator[str]:
    """The Hub's cache and others' hold links: cleaned, or copied without what they point at."""
    for name in MODEL_FILES:
        path = directory / name
        if path.is_symlink() and not path.exists():
            target = os.readlink(path)
            yield f"{name} is a link to {target}, which is not there; copy the file itself, or download it again"


def _adapter(directory: Path) -> Iterator[str]:
    adapter = _glob(directory, "adapter_config.json", *ADAPTER_FILES)
    if adapter:
        yield (
            f"holds a LoRA adapter ({_names(adapter)}), not a model; give it to extract_task_vector_7b.py as "
            "--finetuned_model_path, or merge it into its base with peft's merge_and_unload() and save that"
        )


def _shards(directory: Path) -> Iterator[str]:
    """Shards that no index lists. Which belong together is not guessed: a stale one would be merged in."""
    shards = [(path, match) for path in _glob(directory, "*") if (match := _SHARD.fullmatch(path.name))]
    for path, match in shards:
        stem, count, suffix = match.groups()
        own = [other for other, m in shards if m.groups() == match.groups()]
        index = f"{stem}{suffix}.index.json"
        if len(own) < int(count):
            yield f"{len(own)} of {int(count)} shards ({_names(own)}) and no {index}; finish the download"
        yield (
            f"{len(own)} shard(s) ({path.name}, …) but no {index}, which says what is in them; download it into this "
            "directory"
        )


def _variant(directory: Path) -> Iterator[str]:
    """model.safetensors.index.fp16.json: transformers' `variant`, a second copy of the weights under names of its
    own."""
    for path in _glob(directory, "model.safetensors.index.*.json"):
        yield f"holds the weights as a variant ({path.name}); rename that to {INDEX_NAME}, which reads the same files"


def _unfinished(directory: Path) -> Iterator[str]:
    """Left by a download that stopped."""
    left = _glob(directory, *_UNFINISHED)
    if left:
        yield f"a download that has not finished ({_names(left)}) and no whole weights; run the download again"


def _zero(directory: Path) -> Iterator[str]:
    zero = _glob(directory, *_ZERO)
    if zero:
        yield (
            f"a DeepSpeed ZeRO checkpoint ({_names(zero)}), whose weights are in pieces; gather them with "
            f"`python zero_to_fp32.py {directory} OUT --safe_serialization` and add config.json and the tokenizer"
        )


def _fsdp(directory: Path) -> Iterator[str]:
    """PyTorch's distributed checkpoint, as FSDP saves it."""
    for place in (directory, *_glob(directory, "pytorch_model_fsdp*", "distcp*", "*/pytorch_model_fsdp*")):
        if pieces := _glob(place, "*.distcp"):
            yield (
                f"a sharded FSDP checkpoint ({_names(pieces)}), whose weights are in pieces; put them together with "
                f"`accelerate merge-weights {place} OUT` and add config.json and the tokenizer"
            )


def _archive(directory: Path) -> Iterator[str]:
    if found := _glob(directory, *_ARCHIVES):
        yield f"holds an archive ({_names(found)}) and no weights beside it; unpack it, and point at what comes out"


def _images(directory: Path) -> Iterator[str]:
    """diffusers' pipelines and LoRAs."""
    if found := _glob(directory, "model_index.json", "pytorch_lora_weights.*"):
        yield f"holds what diffusers reads ({_names(found)}), for image models; these scripts take transformers' models"


def _gguf(directory: Path) -> Iterator[str]:
    files = _glob(directory, "*.gguf")
    if files:
        yield f"holds GGUF ({_names(files)}), which llama.cpp reads; take the safetensors version of the model"


def _deeper(directory: Path) -> Iterator[str]:
    """One level too high: a folder of models, a trainer's output, an unpacked archive."""
    folders = [path for path in _glob(directory, "*") if path.is_dir()]
    below = [path for path in folders if has_weights(path)]
    adapters = [path for path in folders if (path / "adapter_config.json").is_file()]
    if len(below) == 1:
        yield f"no weights in it, but in {below[0]}; point there"
    if adapters and not below:
        yield f"no weights in it, but {len(adapters)} adapter(s) below ({_names(adapters)}); point at one of them"
    if below:
        yield f"no weights in it, but in {len(below)} directories below ({_names(below)}); point at one of them"


def _other(directory: Path) -> Iterator[str]:
    loose = [path for path in _glob(directory, "*.safetensors", "*.bin") if not path.name.startswith(_NOT_MODELS)]
    if len(loose) == 1:
        name = SINGLE_NAME if loose[0].suffix == ".safetensors" else bins.SINGLE_NAME
        yield f"holds {loose[0].name} but no {name}; if that is the whole model, rename it to {name}"
    for pattern, what in _OTHERS.items():
        files = _glob(directory, pattern)
        if files:
            found = f"{what} ({_names(files)})"
            yield f"holds {found}; take the version of the model that transformers reads, in safetensors"


def what_file(path: Path) -> str:
    """Why a file is no model directory: what_file(Path("m/model.safetensors")) -> "a file; give the directory … m"."""
    if path.suffix == ".gguf":
        return "GGUF, which llama.cpp reads; take the safetensors version of the model"
    if any(path.match(pattern) for pattern in _ARCHIVES):
        return "an archive; unpack it, and give the directory that comes out"
    return f"a file; give the directory that holds it, {path.parent}"


def not_gathered(tensors: list[Tensor]) -> str | None:
    """What to say of weights that DeepSpeed ZeRO-3 saved without gathering them: most are placeholders of no
    element."""
    empty = [tensor for tensor in tensors if tensor.is_parameter and tensor.shape == (0,)]
    if 2 * len(empty) <= len(tensors):
        return None
    return (
        f"{len(empty)} of {len(tensors)} tensors are empty, as DeepSpeed ZeRO-3 leaves them where it does not gather "
        "the weights; save with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the training "
        "checkpoint"
    )
