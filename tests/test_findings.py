"""Error lines look at what is there before they say what is not: one line for each thing that people point at instead."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import chain, refusal, run, state, write
from safetensors.torch import save_file

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BIN = "pytorch_model-00001-of-00001.bin"
PEFT = "--finetuned_model_path, or merge it into its base with peft's merge_and_unload() and save that"
ZERO = (
    "whose weights are in pieces; gather them with `python zero_to_fp32.py {m} OUT --safe_serialization` and add "
    "config.json and the tokenizer"
)
TAKE = "take the version of the model that transformers reads, in safetensors"
HOLDS = {
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "holds a LoRA adapter (adapter_config.json, adapter_model.safetensors), not a model; give it to "
        f"extract_task_vector_7b.py as {PEFT}",
    ),
    "old adapter": (
        ["adapter_model.bin", "README.md"],
        f"holds a LoRA adapter (adapter_model.bin), not a model; give it to extract_task_vector_7b.py as {PEFT}",
    ),
    "shards without index": (
        [ONE, TWO],
        f"2 shard(s) ({ONE}, …) but no model.safetensors.index.json, which says what is in them; download it to them",
    ),
    "a shard": ([TWO], f"1 of 2 shards ({TWO}) and no model.safetensors.index.json; finish the download"),
    "bin": (
        [BIN],
        f"1 shard(s) ({BIN}, …) but no pytorch_model.bin.index.json, which says what is in them; download it to them",
    ),
    "partial": (
        [".cache/huggingface/download/x.incomplete", "tokenizer.json"],
        "a download that has not finished (x.incomplete) and no whole weights; run the download again",
    ),
    "aria2": (
        ["model.safetensors.aria2"],
        "a download that has not finished (model.safetensors.aria2) and no whole weights; run the download again",
    ),
    "ZeRO": (
        ["zero_to_fp32.py", "global_step10/x.pt", "latest"],
        f"a DeepSpeed ZeRO checkpoint (global_step10, zero_to_fp32.py), {ZERO}",
    ),
    "inside ZeRO": (
        ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"],
        "a DeepSpeed ZeRO checkpoint (bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt, "
        f"zero_pp_rank_0_mp_rank_00_model_states.pt), {ZERO}",
    ),
    "cache": (
        ["models--org--a--b/snapshots/0/x", "models--x--y/z"],
        "the Hub's cache of 2 model(s); give a model's id, such as org/a--b",
    ),
    "HF_HOME": (["hub/models--x--y/z", "token"], "the Hub's cache of 1 model(s); give a model's id, such as x/y"),
    "GGUF": (
        ["m.Q4_K_M.gguf", "m.Q8_0.gguf"],
        "holds GGUF (m.Q4_K_M.gguf, m.Q8_0.gguf), which llama.cpp reads; take the safetensors version of the model",
    ),
    "too high": (["sub/model.safetensors"], "no weights in it, but in {m}/sub; point there"),
    "trainer": (
        [f"checkpoint-{i}/model.safetensors.index.json" for i in range(1, 5)],
        "no weights in it, but in 4 directories below (checkpoint-1, checkpoint-2, checkpoint-3, …); point at one of them",
    ),
    "another name": (
        ["mymodel.safetensors", "training_args.bin", "optimizer.bin"],
        "holds mymodel.safetensors but no model.safetensors; if that is the whole model, rename it to model.safetensors",
    ),
    "Mistral's": (
        ["consolidated.safetensors", "params.json"],
        f"holds the weights as Mistral first published them (consolidated.safetensors); {TAKE}",
    ),
    "TensorFlow": (["tf_model.h5"], f"holds TensorFlow weights (tf_model.h5); {TAKE}"),
    "our job": (
        [".run/run.json", "model.safetensors.tmp"],
        "left by a job of these scripts that has not finished; run its command again, then point at its output",
    ),
    "our job inside": (
        [".part/.run/run.json"],
        "a job of these scripts that writes there has not finished; run its command again",
    ),
}


def fill(directory: Path, names: list[str]) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")
    return directory


@pytest.mark.parametrize("names, line", HOLDS.values(), ids=HOLDS)
def test_what_is_there(tmp_path, names, line):
    """With and without a config.json beside it, from both ends of the chain."""
    model = fill(tmp_path / "m", names)
    expected = f"{model}: {line.replace('{m}', str(model))}"
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == expected
    (model / "config.json").write_text("{}")
    assert refusal("prune", "--task_vector_paths", model, "--save_directories", tmp_path / "out") == expected
    assert not (tmp_path / "out").exists()


def test_a_models_folder_in_the_cache(tmp_path):
    """The folder with snapshots, refs and blobs: the snapshot is named, and is accepted."""
    root = tmp_path / "models--org--name"
    snapshot = write(root / "snapshots" / "0123abcd", state())
    fill(root, ["refs/main"])
    for place in (root, root / "snapshots"):
        assert refusal("convert", "--model_path", place, "--save_path", tmp_path / "out") == (
            f"{place}: a model's folder in the Hub's cache; point at {snapshot}, or give the id org/name"
        )
    run("convert", "--model_path", snapshot, "--save_path", tmp_path / "out")
    shutil.rmtree(snapshot)
    assert refusal("convert", "--model_path", root, "--save_path", tmp_path / "out2") == (
        f"{root}: a model's folder in the Hub's cache, and no snapshot in it holds weights; give the id org/name"
    )


def test_zero_3_leftovers(tmp_path):
    """Saved without gathering: names and placeholders, which no header check refuses."""
    model = write(tmp_path / "m", dict.fromkeys(state(), torch.empty(0, dtype=torch.float16)) | {"x": torch.ones(2)})
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}: 6 of 7 tensors are empty, as DeepSpeed ZeRO-3 leaves them where it does not gather the weights; save with "
        "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the training checkpoint"
    )
    save_file({"a": torch.empty(0), "b": torch.ones(2)}, model / "model.safetensors")
    run("convert", "--model_path", model, "--save_path", tmp_path / "out")


def test_a_file_instead_of_its_directory(tmp_path):
    model = write(tmp_path / "m", state())
    line = refusal("convert", "--model_path", model / "model.safetensors", "--save_path", tmp_path / "out")
    assert line == f"{model}/model.safetensors: a file; give the directory that holds it, {model}"


def test_a_missing_shard_counts_what_is_there(tmp_path):
    model = write(tmp_path / "m", state(), files=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    line = refusal("convert", "--model_path", model, "--save_path", tmp_path / "out")
    assert line.endswith("names it (2 of 3 files are there); download the rest")


def test_a_vector_in_the_making(tmp_path):
    """models/x.part given for models/x."""
    folder = chain(tmp_path / "c")
    (folder / "va").rename(folder / "va.part")
    fill(folder / "va.part", [".run/run.json"])
    (folder / "va.part" / "model.safetensors").unlink()
    line = refusal("prune", "--task_vector_paths", folder / "va.part", "--save_directories", tmp_path / "out")
    assert line.startswith(f"{folder / 'va.part'}: left by a job of these scripts that has not finished")
