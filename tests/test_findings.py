"""Error lines look at what is there before they say what is not: one line for each thing that people point at
instead.
"""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import chain, extract, refusal, run, state, write
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
        f"2 shard(s) ({ONE}, …) but no model.safetensors.index.json, which says what is in them; download it into this "
        "directory",
    ),
    "a shard": ([TWO], f"1 of 2 shards ({TWO}) and no model.safetensors.index.json; finish the download"),
    "bin": (
        [BIN],
        f"1 shard(s) ({BIN}, …) but no pytorch_model.bin.index.json, which says what is in them; download it into this "
        "directory",
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
        "no weights in it, but in 4 directories below (checkpoint-1, checkpoint-2, checkpoint-3, …); point at one of "
        "them",
    ),
    "another name": (
        ["mymodel.safetensors", "training_args.bin", "optimizer.bin"],
        "holds mymodel.safetensors but no model.safetensors; if that is the whole model, rename it to "
        "model.safetensors",
    ),
    "Mistral's": (
        ["consolidated.safetensors", "params.json"],
        f"holds the weights as Mistral first published them (consolidated.safetensors); {TAKE}",
    ),
    "TensorFlow": (["tf_model.h5"], f"holds TensorFlow weights (tf_model.h5); {TAKE}"),
    "FSDP": (
        ["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"],
        "a sharded FSDP checkpoint (__0_0.distcp), whose weights are in pieces; put them together with `accelerate "
        "merge-weights {m}/pytorch_model_fsdp_0 OUT` and add config.json and the tokenizer",
    ),
    "inside FSDP": (
        ["__0_0.distcp", "__1_0.distcp", ".metadata"],
        "a sharded FSDP checkpoint (__0_0.distcp, __1_0.distcp), whose weights are in pieces; put them together with "
        "`accelerate merge-weights {m} OUT` and add config.json and the tokenizer",
    ),
    "Megatron": (
        ["iter_0000100/mp_rank_00/model_optim_rng.pt", "latest_checkpointed_iteration.txt"],
        f"holds a Megatron checkpoint (latest_checkpointed_iteration.txt); {TAKE}",
    ),
    "OpenVINO": (["openvino_model.bin", "openvino_model.xml"], f"holds an OpenVINO model (openvino_model.bin); {TAKE}"),
    "ONNX below": (["onnx/model.onnx"], f"holds an ONNX model (model.onnx); {TAKE}"),
    "MLX": (["model.npz"], f"holds MLX or NumPy weights (model.npz); {TAKE}"),
    "an archive": (
        ["model.tar.gz"],
        "holds an archive (model.tar.gz) and no weights beside it; unpack it, and point at what comes out",
    ),
    "diffusers": (
        ["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
        "holds what diffusers reads (model_index.json), for image models; these scripts take transformers' models",
    ),
    "diffusers' LoRA": (
        ["pytorch_lora_weights.safetensors"],
        "holds what diffusers reads (pytorch_lora_weights.safetensors), for image models; these scripts take "
        "transformers' models",
    ),
    "a variant in shards": (
        ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
        "holds the weights as a variant (model.safetensors.index.fp16.json); rename that to "
        "model.safetensors.index.json, "
        "which reads the same files",
    ),
    "adapters below": (
        [f"checkpoint-{i}/adapter_{what}" for i in (5, 10) for what in ("config.json", "model.safetensors")],
        "no weights in it, but 2 adapter(s) below (checkpoint-10, checkpoint-5); point at one of them",
    ),
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
        f"{model}: 6 of 7 tensors are empty, as DeepSpeed ZeRO-3 leaves them where it does not gather the weights; "
        "save with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the training checkpoint"
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


def test_a_file_that_is_something_else(tmp_path):
    for name, line in (
        ("m.gguf", "GGUF, which llama.cpp reads; take the safetensors version of the model"),
        ("m.zip", "an archive; unpack it, and give the directory that comes out"),
    ):
        path = fill(tmp_path, [name]) / name
        assert refusal("convert", "--model_path", path, "--save_path", tmp_path / "out") == f"{path}: {line}"


def test_links_to_nothing(tmp_path):
    """A cache that was cleaned, or copied without its blobs."""
    model = write(tmp_path / "m", state())
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/0123")
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}: model.safetensors is a link to ../../blobs/0123, which is not there; copy the file itself, or "
        "download it again"
    )


def test_a_config_alone(tmp_path):
    """Of a model, and in the Hub's cache, where a snapshot begins with it."""
    model = fill(tmp_path / "m", ["config.json", "tokenizer.json"])
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}: a config.json but no weights (model.safetensors, pytorch_model.bin, or an index of several); "
        "download those too"
    )
    snapshot = fill(tmp_path / "models--org--a" / "snapshots" / "01", ["config.json"])
    assert refusal("convert", "--model_path", snapshot, "--save_path", tmp_path / "out") == (
        f"{snapshot}: a snapshot in the Hub's cache whose weights have not been downloaded; give the id org/a"
    )


def test_weights_that_hold_nothing(tmp_path):
    model = write(tmp_path / "m", {})
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}: its weight files hold no tensor; download or save the model again"
    )


def test_a_web_page_instead_of_weights(tmp_path):
    model = write(tmp_path / "m", state())
    (model / "model.safetensors").write_bytes(b"<!DOCTYPE html><html><body>Access denied</body></html>")
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}/model.safetensors: a web page, not the file, as a download without access leaves it; download it "
        "again"
    )


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_training_checkpoint_in_a_bin(tmp_path, key):
    """Lightning, DeepSpeed and many a script save it so."""
    model = write(tmp_path / "m", {key: state(), "epoch": 3}, suffix=".bin")
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"{model}/pytorch_model.bin: a training checkpoint, whose tensors are one level deeper, under {key!r}; save "
        "what is there alone, or use a safetensors version of this model"
    )


@pytest.mark.parametrize("name", ["__metadata__", "n" * 1001], ids=["the header's", "too long"])
def test_names_that_no_safetensors_file_can_hold(tmp_path, name):
    """A .bin has room for any; what is written from it has to be read again."""
    model = write(tmp_path / "m", state() | {name: torch.ones(3)}, suffix=".bin")
    line = refusal("convert", "--model_path", model, "--save_path", tmp_path / "out")
    assert line == (
        f"{model}/pytorch_model.bin: {name!r:.80} is not a tensor's name; use a safetensors version of this model"
    )


def test_more_dimensions_than_are_read_again(tmp_path):
    model = write(tmp_path / "m", state() | {"x": torch.ones([1] * 17)}, suffix=".bin")
    line = refusal("convert", "--model_path", model, "--save_path", tmp_path / "out")
    assert line == (
        f"tensor 'x' in {model}/pytorch_model.bin: 17 dimensions, at most 16 are accepted; use a safetensors version "
        "of this model"
    )


QUANTISED = {
    "bitsandbytes": ({"a.weight": (32, "uint8"), "a.weight.absmax": (4, "float32")}, "a.weight", "U8"),
    "bitsandbytes, 8 bits": ({"a.weight": (9, "int8"), "a.SCB": (3, "float32")}, "a.weight", "I8"),
    "GPTQ, AWQ": (
        {"a.qweight": (9, "int32"), "a.qzeros": (3, "int32"), "a.scales": (3, "float16")},
        "a.qweight",
        "I32",
    ),
    "mlx": ({"a.weight": (9, "uint32"), "a.scales": (3, "float16"), "a.biases": (3, "float16")}, "a.weight", "U32"),
    "gpt-oss": ({"e.up_blocks": (9, "uint8"), "e.up_scales": (3, "uint8")}, "e.up_blocks", "U8"),
    "compressed-tensors": (
        {"a.weight_shape": (2, "int64"), "a.weight_packed": (32, "int32"), "a.weight_scale": (4, "float16")},
        "a.weight_packed",
        "I32",
    ),
}


@pytest.mark.parametrize("says", [True, False], ids=["config says so", "config is silent"])
@pytest.mark.parametrize("tensors, name, dtype", QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights(tmp_path, tensors, name, dtype, says):
    """As buffers they would pass unchanged; whatever config.json says, they are refused."""
    made = {n: torch.ones(size, dtype=getattr(torch, kind)) for n, (size, kind) in tensors.items()}
    config = {"quantization_config": {"quant_method": "x"}} if says else {}
    model = write(tmp_path / "m", made | {"norm.weight": torch.ones(3).half()}, config)
    assert refusal("convert", "--model_path", model, "--save_path", tmp_path / "out") == (
        f"tensor {name!r} is {dtype} in {model}: its weights are quantised; take an unquantised version of the model"
    )


BRACKETS = {
    "one": (["head[0].weight"], "'head[[]0].weight'"),
    "a part": (["a[0].w", "a[0].b"], "'a[[]0].*'"),
    "layers": (["b.0.q?", "b.1.q?"], "'b.*.q[?]'"),
}


@pytest.mark.parametrize("names, pattern", BRACKETS.values(), ids=BRACKETS)
def test_what_is_advised_leaves_out_just_that(tmp_path, names, pattern):
    """Names with brackets and wildcards, beside names that they would match as patterns."""
    both, alone = ({name: torch.ones(2).half() for name in part} for part in (("a0.w", "b.0.qq", "b.1.qq"), names))
    write(tmp_path / "base", state() | both)
    write(tmp_path / "ft", state(1) | both | alone)
    paths = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v")
    assert line.endswith(f" out with --skip {pattern}")
    extract(tmp_path / "ft", tmp_path / "base", tmp_path / "v", "--skip", pattern.strip("'"))


def test_a_spelled_out_tie_is_left_out_as_advised(tmp_path):
    config = {"model_type": "x", "tie_word_embeddings": True}
    name = "model.embed_tokens.weight"
    embedding = {name: torch.ones(3, 2).half()}
    write(tmp_path / "base", embedding, config)
    write(tmp_path / "ft", embedding | {"heads[0].lm_head.weight": torch.zeros(3, 2).half()}, config)
    paths = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v")
    advised = line.rpartition("--skip ")[2].strip("'")
    extract(tmp_path / "ft", tmp_path / "base", tmp_path / "v", "--skip", advised)
