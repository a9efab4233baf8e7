"""Experts that one model stores fused and the other one by one: transformers' own models, saved by transformers."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import extract, load, refusal, run, write
from tiny_configs import LLAMA, moved

import merge_and_evaluate_7b
from common.shards.fused import Fused, fusions, taken_apart
from common.shards.headers import Tensor

KINDS = {
    "MixtralForCausalLM": lambda t: t.MixtralConfig(**LLAMA, num_local_experts=3),
    "Qwen2MoeForCausalLM": lambda t: t.Qwen2MoeConfig(
        **LLAMA, num_experts=4, moe_intermediate_size=6, shared_expert_intermediate_size=6
    ),
    "OlmoeForCausalLM": lambda t: t.OlmoeConfig(**LLAMA, num_experts=2),
}


@cache
def made(kind: str, folder: Path) -> tuple[dict, dict, dict]:
    """(the fine-tuned model's tensors as save_pretrained writes them, its state dict, config), folder/base written."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(KINDS[kind](transformers)).half()
    model.save_pretrained(folder / kind / "base")
    model.load_state_dict(moved(model.state_dict()))
    model.save_pretrained(folder / kind / "ft")
    config = json.loads((folder / kind / "base" / "config.json").read_text())
    return load(folder / kind / "ft"), {n: t.clone() for n, t in model.state_dict().items()}, config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    return lambda kind: (folder / kind, *made(kind, folder))


@pytest.mark.slow
@pytest.mark.parametrize("suffix, wrap", [(".safetensors", ""), (".bin", "module.")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_gives_the_vector_of_the_same_model_saved_apart(saved, tmp_path, capsys, kind, suffix, wrap):
    """Bit for bit, wrapped and in several files, too; then pruned and loaded."""
    folder, apart, fused, config = saved(kind)
    assert len(fused) < len(apart)
    write(tmp_path / "fused", {wrap + n: t for n, t in fused.items()}, config, 2, suffix)
    write(tmp_path / "apart", apart, config)
    for name in ("fused", "apart"):
        extract(tmp_path / name, folder / "base", tmp_path / f"v_{name}")
        if name == "fused":
            assert "4 tensors of " in (said := capsys.readouterr().out) and "hold the experts of a layer fused" in said
    one, other = load(tmp_path / "v_fused"), load(tmp_path / "v_apart")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert sum(bool(t.any()) for t in one.values()) > len(one) // 2
    run("prune", "--task_vector_paths", tmp_path / "v_fused", "--save_directories", tmp_path / "p", "--n", 4, "--m", 4)
    got = getattr(transformers, kind).from_pretrained(tmp_path / "p", dtype=torch.float16).state_dict()
    base = getattr(transformers, kind).from_pretrained(folder / "base", dtype=torch.float16).state_dict()
    for name, tensor in fused.items():
        want = base[name].float() + (tensor.float() - base[name].float()).half().float()
        assert torch.equal(got[name], want.half()), name


def test_a_fused_model_in_a_streamed_merge(saved, tmp_path):
    """The bytes of the merge with the same model saved apart."""
    folder, apart, fused, config = saved("MixtralForCausalLM")
    for name, tensors in (("fused", fused), ("apart", apart)):
        write(tmp_path / name, tensors, config)
        (tmp_path / f"{name}.yml").write_text(
            f"merge_method: cabs\nbase_model: {folder}/base\ndtype: float32\nout_dtype: float16\nparameters: "
            f"{{n: 1, m: 4}}\nmodels: [{{model: {tmp_path}/{name}, parameters: {{weight: 0.7}}}}]\n"
        )
        arguments = ["--recipe", f"{tmp_path}/{name}.yml", "--save_path", f"{tmp_path}/m_{name}", "--merge_only"]
        merge_and_evaluate_7b.main(arguments)
    one, other = (tmp_path / f"m_{name}" / "model.safetensors" for name in ("fused", "apart"))
    assert one.read_bytes() == other.read_bytes()


def test_a_fused_base_is_refused_with_what_to_do(saved, tmp_path):
    """What is advised then works."""
    folder, apart, fused, config = saved("Qwen2MoeForCausalLM")
    base = transformers.Qwen2MoeForCausalLM.from_pretrained(folder / "base", dtype=torch.float16)
    write(tmp_path / "base", {n: t.clone() for n, t in base.state_dict().items()}, config)
    write(tmp_path / "ft", apart, config)
    flags = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *flags, "--save_path", tmp_path / "v")
    assert line == (
        f"tensor 'model.layers.0.mlp.experts.gate_up_proj' of {tmp_path}/base holds the experts of a layer fused, "
        f"which {tmp_path}/ft stores one by one; load {tmp_path}/ft with transformers 5 and save it with "
        "save_pretrained(…, save_original_format=False)"
    )
    model = transformers.Qwen2MoeForCausalLM.from_pretrained(tmp_path / "ft", dtype=torch.float16)
    model.save_pretrained(tmp_path / "ft2", save_original_format=False)
    extract(tmp_path / "ft2", tmp_path / "base", tmp_path / "v")
    vector = load(tmp_path / "v")
    for name, tensor in base.state_dict().items():
        assert torch.equal(vector[name], (fused[name].float() - tensor.float()).half()), name


def test_what_is_no_run_of_bytes_is_not_taken_apart():
    """Stacked and joined rows are; what is transposed, interleaved, or an odd shape is not."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    two, one = ["e.*.w1.weight", "e.*.w3.weight"], ["e.*.w2.weight"]
    stacked, joined, turned = MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)
    assert fusions([WeightConverter(two, "e.up", operations=[stacked, joined])]) == (Fused("e.up", tuple(two)),)
    assert fusions([WeightConverter(one, "e.down", operations=[stacked])]) == (Fused("e.down", tuple(one)),)
    for operations in ([stacked, joined, turned], [stacked, Concatenate(dim=2)], [MergeModulelist(dim=1), joined]):
        assert fusions([WeightConverter(two, "e.up", operations=operations)]) == ()
    up = Fused("e.up", tuple(two))
    odd = {"x.e.up": Tensor("x.e.up", "F16", (2, 3, 4), Path("f"), 8, 48)}
    assert taken_apart(odd, (up,), []) == odd
    even = {"x.e.up": Tensor("x.e.up", "F16", (2, 2, 3), Path("f"), 8, 24)}
    found = taken_apart(even, (up,), ["x.e.0.w1.weight"])
    assert [(n, t.shape, t.offset, t.nbytes) for n, t in found.items()] == [
        (f"x.e.{i}.{part}.weight", (1, 3), 8 + 6 * (2 * i + j), 6)
        for i in range(2)
        for j, part in enumerate(("w1", "w3"))
    ]
    assert taken_apart(even, (up,), ["x.e.up"]) == even
