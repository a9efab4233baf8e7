"""Tiny checkpoints: made, written in every layout, loaded by other libraries than ours, and run through the scripts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common.exits
import convert_dtype
import extract_task_vector_7b
import prune_task_vector_7b

MAINS = {"convert": convert_dtype.main, "extract": extract_task_vector_7b.main, "prune": prune_task_vector_7b.main}
CONFIG = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "torch_dtype": "float32"}
SHAPES = {
    "lm_head.weight": (11, 7),
    "model.embed_tokens.weight": (11, 7),
    "model.layers.0.mlp.up_proj.weight": (13, 7),
    "model.layers.0.self_attn.q_proj.bias": (5,),
    "model.layers.0.self_attn.q_proj.weight": (7, 7),
    "model.norm.weight": (7,),
}


def state(seed: int = 0, dtype=torch.float16, shapes=SHAPES, near: dict | None = None) -> dict:
    """Random tensors of the given shapes; `near` a base they differ a little from it."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if near is None:
        return {name: value.to(dtype) for name, value in noise.items()}
    return {name: (near[name].float() + 0.01 * value).to(dtype) for name, value in noise.items()}


def _save(tensors: dict, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def write(directory: Path, tensors: dict, config: dict | None = None, files: int = 1, suffix=".safetensors") -> Path:
    """A checkpoint of `files` files, as transformers names them, with index where there are several."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    if files == 1:
        _save(tensors, directory / f"{stem}{suffix}")
        return directory
    weight_map, names = {}, list(tensors)
    for i in range(files):
        file = f"{stem}-{i + 1:05}-of-{files:05}{suffix}"
        part = {name: tensors[name] for name in names[i::files]}
        _save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return directory


def load(directory: Path) -> dict:
    """{name: tensor} by safetensors and torch; an index must name exactly what its files hold."""
    found, where = {}, {}
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        part = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert not part.keys() & found.keys()
        found |= part
        where |= dict.fromkeys(part, path.name)
    for index in directory.glob("*.index.json"):
        assert json.loads(index.read_text())["weight_map"] == where
    return found


def run(script: str, *arguments) -> None:
    """A script's main in this process: run("convert", "--model_path", path, ...)."""
    MAINS[script]([str(argument) for argument in arguments])


def extract(finetuned: Path, base: Path, save: Path, *more) -> None:
    """The second script: save = finetuned minus base."""
    run("extract", "--finetuned_model_path", finetuned, "--base_model_path", base, "--save_path", save, *more)


def prune(vectors: list[Path], outputs: list[Path], *more) -> None:
    """The third script: each of the vectors, pruned, to the output at its place in the list."""
    run("prune", "--task_vector_paths", *vectors, "--save_directories", *outputs, *more)


def refusal(script: str, *arguments) -> str:
    """The one line a script ends with on bad data, without "error: "; anything but that fails."""
    with pytest.raises(SystemExit) as stop:
        common.exits.run(lambda: run(script, *arguments))
    line = stop.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line, line
    return line.removeprefix("error: ")


def usage_error(capsys, script: str, *arguments) -> str:
    """What argparse says last on a usage error, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].split("error: ", 1)[1]


def files(directory: Path) -> dict[str, bytes]:
    """{relative path: bytes} of everything in a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def chain(folder: Path, dtype=torch.float16, buffers: dict | None = None) -> Path:
    """folder/base, a, b (fine-tuned) and va, vb (their task vectors), of SHAPES and of `buffers`, if given."""
    base = state(0, dtype)
    extra = buffers or {}
    write(folder / "base", base | extra)
    for seed, name in enumerate("ab", 1):
        write(folder / name, state(seed, dtype, near=base) | extra)
        extract(folder / name, folder / "base", folder / f"v{name}", "--dtype", str(dtype).removeprefix("torch."))
    return folder


def prune_arguments(folder: Path, *more) -> list:
    """The arguments that prune folder/va and vb to folder/pa and pb with 1:4 unless `more` says otherwise."""
    own = [] if "--pruning_method" in more else ["--n", 1, "--m", 4]
    return [
        "--task_vector_path1",
        folder / "va",
        "--task_vector_path2",
        folder / "vb",
        "--save_directory1",
        folder / "pa",
        "--save_directory2",
        folder / "pb",
        *own,
        *more,
    ]
