"""LoRA adapters as fine-tuned models: against a slow oracle bit for bit, and against peft itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import load, refusal, run
from conftest import first_quick
from safetensors.torch import load_file, save_file

from common.pruners.kernels.lora import delta_rows

LLAMA = dict(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)


def slow_delta(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """scale · B·A, one rounded step after the other."""
    out = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            total = np.float32(0)
            for k in range(a.shape[0]):
                total = np.float32(total + np.float32(b[i, k] * a[k, j]))
            out[i, j] = np.float32(total * np.float32(scale))
    return out


@pytest.mark.parametrize("rank, rows, columns", [(1, 1, 1), (3, 5, 7), (8, 33, 65), (17, 4, 259)])
def test_delta_rows(rank, rows, columns):
    """The oracle's bits, whatever the block of rows: no fused multiply-add, nothing regrouped."""
    random = np.random.default_rng(rank)
    a = (random.standard_normal((rank, columns)) * 10.0 ** random.integers(-6, 6, (rank, columns))).astype(np.float32)
    b = (random.standard_normal((rows, rank)) * 10.0 ** random.integers(-6, 6, (rows, rank))).astype(np.float32)
    want = slow_delta(a, b, 1.7)
    for size in (1, 2, rows):
        got = np.concatenate([delta_rows(a, b, 1.7, i, min(i + size, rows)) for i in range(0, rows, size)])
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


def model(kind: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


ADAPTERS = {
    "plain": ("llama", dict(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])),
    "rsLoRA": ("llama", dict(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")),
    "patterns": (
        "llama",
        dict(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 4},
            alpha_pattern={"^model.layers.0.mlp.down_proj": 7},
        ),
    ),
    "embeddings": ("llama", dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head", "k_proj"])),
    "modules to save": (
        "llama",
        dict(r=2, lora_alpha=3, target_modules=["o_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "Conv1D": ("gpt2", dict(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "Conv1D, unsaid": ("gpt2", dict(r=2, lora_alpha=3, target_modules=["c_attn"], fan_in_fan_out=False)),
}


def adapted(folder: Path, kind: str, settings: dict, dtype=torch.float32):
    """folder/base, folder/lora as peft saves it; returns peft's own merged state dict."""
    base = model(kind)
    base.save_pretrained(folder / "base")
    import peft  # five seconds, not paid where no adapter is made

    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.to(dtype).save_pretrained(folder / "lora")
    return wrapped.float().merge_and_unload().state_dict()


def extract_lora(folder: Path, *more) -> dict:
    run(
        "extract",
        "--finetuned_model_path",
        folder / "lora",
        "--base_model_path",
        folder / "base",
        "--save_path",
        folder / "v",
        *more,
    )
    return load(folder / "v")


@pytest.mark.slow
@pytest.mark.parametrize("kind, settings", ADAPTERS.values(), ids=ADAPTERS)
def test_as_peft_merges(tmp_path, kind, settings):
    """base + vector is peft's merged model within float32; +0.0 for every tensor that is not adapted."""
    merged = adapted(tmp_path, kind, settings)
    vector, base = extract_lora(tmp_path, "--dtype", "float32"), load(tmp_path / "base")
    assert vector.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and changed == {name for name in vector if vector[name].any()}
    for name in base:
        torch.testing.assert_close(base[name] + vector[name], merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", first_quick("float16", "bfloat16"))
def test_bit_for_bit(tmp_path, dtype):
    """Every adapted tensor is the oracle's, rounded once; A and B in bfloat16."""
    adapted(tmp_path, "llama", ADAPTERS["plain"][1], torch.bfloat16)
    vector = extract_lora(tmp_path, "--dtype", dtype)
    factors = {n: t.float().numpy() for n, t in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()}
    checked = 0
    for name, tensor in vector.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in factors:
            want = slow_delta(factors[f"{stem}A.weight"], factors[f"{stem}B.weight"], 8 / 3)
            assert torch.equal(tensor, torch.from_numpy(want).to(getattr(torch, dtype))), name
            checked += 1
        else:
            assert not tensor.view(torch.int16).any(), name
    assert checked == 6


@pytest.mark.slow
def test_to_the_end(tmp_path):
    """An adapter as .bin gives the vector of the same adapter in safetensors; pruned, it loads."""
    adapted(tmp_path, "llama", ADAPTERS["rsLoRA"][1])
    want = extract_lora(tmp_path)
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save(lora, tmp_path / "lora" / "adapter_model.bin")
    got = extract_lora(tmp_path, "--overwrite")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    run("prune", "--task_vector_paths", tmp_path / "v", "--save_directories", tmp_path / "p", "--n", 1, "--m", 4)
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "p")


MERGE = "merge it with peft's merge_and_unload(), save the model and extract from that"
REFUSED = {
    "DoRA": ({"use_dora": True}, "DoRA (use_dora in adapter_config.json), and only plain LoRA is read here; " + MERGE),
    "IA3": ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA is read here; " + MERGE),
    "a prefix": (
        {"peft_type": "PREFIX_TUNING"},
        "an adapter of type 'PREFIX_TUNING'; only LORA is read here; " + MERGE,
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights is 'pissa_niter_4', so it belongs to a base that peft has changed, not to the published "
        "one; " + MERGE,
    ),
    "a wrong rank": (
        {"r": 5},
        "module 'model.layers.0.mlp.up_proj' has rank 3 in its tensors but 5 in adapter_config.json; download the "
        "adapter again",
    ),
    "no alpha": (
        {"lora_alpha": None},
        "lora_alpha of 'model.layers.0.mlp.up_proj' is None, not a finite number; download the adapter again",
    ),
}


@pytest.mark.parametrize("changes, line", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, changes, line):
    """What it is and what to do; nothing is written."""
    adapted(tmp_path, "llama", ADAPTERS["plain"][1])
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    got = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "lora",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    )
    assert got == f"{tmp_path}/lora: {line}"
    assert not (tmp_path / "v").exists()


def test_an_adapter_of_another_base(tmp_path):
    """Tensors that the base does not have are named."""
    adapted(tmp_path, "llama", ADAPTERS["plain"][1])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n.replace("layers.1.", "layers.7."): t for n, t in load_file(path).items()}, path)
    got = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "lora",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    )
    assert got == (
        f"3 of the 6 tensors that {tmp_path}/lora changes are not in {tmp_path}/base, the first "
        "'base_model.model.model.layers.7.mlp.up_proj.weight'; is it an adapter of this base? Otherwise " + MERGE
    )


@pytest.mark.slow
def test_a_copy_of_the_base_that_differs(tmp_path):
    """peft saves the embedding beside its A and B: were it another base's, the sum would be another model."""
    adapted(tmp_path, "llama", ADAPTERS["embeddings"][1])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("embed_tokens.base_layer.weight"))
    save_file(tensors | {name: tensors[name] + 1}, path)
    got = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "lora",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    )
    assert got == (
        f"tensor '{name}' in {path}: an adapted tensor's own copy of 'model.embed_tokens.weight', and not the same as "
        f"in {tmp_path}/base/model.safetensors; {MERGE}"
    )


@pytest.mark.slow
def test_skip(tmp_path):
    """Products and whole tensors are left out by the base's names; a pattern that matches nothing is refused."""
    adapted(tmp_path, "llama", ADAPTERS["modules to save"][1])
    vector = extract_lora(tmp_path, "--skip", "lm_head.*", "*.layers.0.*")
    rest = {f"model.layers.1.{n}.weight" for n in ("self_attn.o_proj", "input_layernorm", "post_attention_layernorm")}
    assert {n for n, t in vector.items() if t.any()} == rest | {"model.norm.weight"}  # peft goes by the ends of names
    got = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "lora",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "w",
        "--skip",
        "head",
    )
    assert got == (
        f"--skip 'head': no tensor of {tmp_path}/base has such a name, and what {tmp_path}/lora changes is left out by "
        "the base's names; correct it"
    )
