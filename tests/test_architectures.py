"""Models as people have them: names, ties, constants and extra heads that two copies of one model differ in.

Tiny models through transformers' own classes, saved by transformers, then spelled otherwise tensor by tensor.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load, refusal, run, state, write
from tiny_configs import BART, LLAMA, SMALL, moved

from common.shards.checkpoint import open_checkpoint
from common.shards.matching import mask_names, match
from common.shards.names import patterns, unwrapped

CONFIGS = {
    "LlamaForCausalLM": lambda t: t.LlamaConfig(**LLAMA),
    "GPT2LMHeadModel": lambda t: t.GPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=2, n_head=2),
    "GPTNeoXForCausalLM": lambda t: t.GPTNeoXConfig(**SMALL, max_position_embeddings=16),
    "GPTJForCausalLM": lambda t: t.GPTJConfig(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=2, n_head=2, rotary_dim=2
    ),
    "T5ForConditionalGeneration": lambda t: t.T5Config(
        vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    ),
    "BartForConditionalGeneration": lambda t: t.BartConfig(**BART),
    "MarianMTModel": lambda t: t.MarianConfig(**BART | {"pad_token_id": 0}),
    "WhisperForConditionalGeneration": lambda t: t.WhisperConfig(
        **BART | {"max_target_positions": 16, "num_mel_bins": 4, "max_source_positions": 8, "pad_token_id": 0}
    ),
    "RobertaForMaskedLM": lambda t: t.RobertaConfig(**SMALL, max_position_embeddings=16),
    "BertForMaskedLM": lambda t: t.BertConfig(**SMALL, max_position_embeddings=16),
    "Qwen2ForCausalLM": lambda t: t.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "LlavaForConditionalGeneration": lambda t: t.LlavaConfig(
        text_config=t.LlamaConfig(**LLAMA).to_dict(),
        vision_config=t.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
        ).to_dict(),
        image_token_index=18,
    ),
}


@cache
def made(kind: str, folder: Path) -> tuple[dict, dict]:
    """(tensors as transformers saves them, in float16; config)."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(CONFIGS[kind](transformers)).half()
    model.save_pretrained(folder / kind)
    return load(folder / kind), json.loads((folder / kind / "config.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return lambda kind: made(kind, folder)


def causal(*layers: str, dtype=torch.float32) -> dict:
    return {name: torch.ones(8, 8, dtype=dtype).tril()[None, None] for name in layers}


def vector_of(folder: Path, base: tuple, finetuned: tuple, *more) -> dict:
    """The task vector's tensors; folder/base, ft, v are written."""
    write(folder / "base", *base)
    write(folder / "ft", *finetuned)
    paths = ["--finetuned_model_path", folder / "ft", "--base_model_path", folder / "base", "--save_path", folder / "v"]
    run("extract", *paths, *more)
    return load(folder / "v")


def same_vector(vector: dict, base: dict, finetuned: dict, rename=lambda name: name) -> None:
    """The vector holds the difference for every tensor of the base, found in the fine-tuned by another name."""
    assert vector.keys() == base.keys()
    for name, tensor in base.items():
        want = (finetuned[rename(name)].half().float() - tensor.half().float()).half() + 0.0
        assert torch.equal(vector[name], want), name


# --- names ----------------------------------------------------------------------------------------

WRAPPED = {
    "torch.compile": ("LlamaForCausalLM", lambda n: "_orig_mod." + n),
    "DDP": ("LlamaForCausalLM", lambda n: "module." + n),
    "DDP of torch.compile": ("BertForMaskedLM", lambda n: "_orig_mod.module." + n),
    "an unmerged peft model's base": ("Qwen2ForCausalLM", lambda n: "base_model.model." + n),
    "FSDP on the way": ("LlamaForCausalLM", lambda n: n.replace(".mlp.", ".mlp._fsdp_wrapped_module.")),
    "activation checkpoints": ("GPTNeoXForCausalLM", lambda n: n.replace(".attention.", "._ckpt.attention.")),
    "GPT-2 as on the Hub": ("GPT2LMHeadModel", lambda n: n.removeprefix("transformer.")),
    "LayerNorm of 2018": (
        "BertForMaskedLM",
        lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
    ),
    "Llava since 4.52": (  # transformers saves the old names, for others' sake; a state dict has the new ones
        "LlavaForConditionalGeneration",
        lambda n: (
            "lm_head.weight"
            if n == "language_model.lm_head.weight"
            else "model." + n.replace("language_model.model.", "language_model.")
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True], ids=["the fine-tuned", "the base"])
@pytest.mark.parametrize("kind, rename", WRAPPED.values(), ids=WRAPPED)
def test_other_names(saved, tmp_path, capsys, kind, rename, turned):
    """Either side may have the other names; the output has the base's, and a note says what was found."""
    tensors, config = saved(kind)
    fine = moved(tensors)
    other = {rename(name): t for name, t in (tensors if turned else fine).items()}
    assert other.keys() != tensors.keys()
    if turned:
        back = {rename(name): name for name in tensors}
        same_vector(vector_of(tmp_path, (other, config), (fine, config)), other, fine, back.get)
    else:
        same_vector(vector_of(tmp_path, (tensors, config), (other, config)), tensors, other, rename)
    assert "note: " in capsys.readouterr().out


def test_an_unknown_architecture_is_taken_by_its_names(tmp_path):
    """A prefix is found without transformers' help; nothing else is guessed."""
    base, config = state(), {"model_type": "none of this world"}
    fine = state(1, near=base)
    same_vector(vector_of(tmp_path, (base, config), ({f"net.{n}": t for n, t in fine.items()}, config)), base, fine)
    other = {n.replace("up_proj", "w1"): t for n, t in fine.items()}
    write(tmp_path / "other", other, config)
    line = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "other",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "out",
    )
    assert line.startswith("5 of 7 tensors agree; only in ")


def test_names_that_agree_import_no_transformers(tmp_path):
    """A base and its fine-tuned model as most people have them: start-up stays as it was."""
    import subprocess
    import sys

    from conftest import ROOT

    config = {"model_type": "mistral", "tie_word_embeddings": False, "vocab_size": 11}
    write(tmp_path / "a", state(), config)
    write(tmp_path / "b", state(1), config)
    code = (
        "import sys; from common.shards.checkpoint import open_checkpoint as o; from common.shards.matching import *\n"
        "b = o(sys.argv[1]); match(b, o(sys.argv[2]), ()); mask_names(b); print('transformers' in sys.modules)"
    )
    got = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], cwd=ROOT, capture_output=True, text=True
    )
    assert got.stdout == "False\n", got.stderr


# --- constants ------------------------------------------------------------------------------------

CONSTANTS = {
    "GPT-2": ("GPT2LMHeadModel", causal("transformer.h.0.attn.bias", "transformer.h.1.attn.bias")),
    "Pythia": (
        "GPTNeoXForCausalLM",
        {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(2)}
        | causal("gpt_neox.layers.0.attention.bias", dtype=torch.float16),
    ),
    "Pythia in float16": (
        "GPTNeoXForCausalLM",
        {f"gpt_neox.layers.{i}.attention.masked_bias": torch.tensor(-float("inf")).half() for i in range(2)},
    ),
    "GPT-J": (
        "GPTJForCausalLM",
        {"transformer.h.0.attn.masked_bias": torch.tensor(-1e9)} | causal("transformer.h.1.attn.bias"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["base", "ft", "both"])
@pytest.mark.parametrize("kind, constants", CONSTANTS.values(), ids=CONSTANTS)
def test_constants(saved, tmp_path, kind, constants, where):
    """Carried from the base where it has them, through convert, extract and prune; dropped where it has none."""
    tensors, config = saved(kind)
    fine = moved(tensors)
    base = tensors | (constants if where != "ft" else {})
    other = fine | (constants if where != "base" else {})
    vector = vector_of(tmp_path, (base, config), (other, config))
    same_vector({n: vector[n] for n in tensors}, tensors, fine)
    assert vector.keys() == base.keys()
    run("convert", "--model_path", tmp_path / "base", "--save_path", tmp_path / "half")
    run("prune", "--task_vector_paths", tmp_path / "v", "--save_directories", tmp_path / "p", "--n", 1, "--m", 4)
    for directory in ("half", "v", "p"):
        got = load(tmp_path / directory)
        assert got.keys() == base.keys()
        for name in constants.keys() & base.keys():
            assert got[name].dtype == constants[name].dtype and torch.equal(got[name], constants[name])
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "p")
    assert all(p.isfinite().all() for p in loaded.parameters())


def test_a_scalar_that_is_a_weight(tmp_path):
    """CLIP's logit_scale is a scalar of the architecture, and subtracted like any other weight."""
    config = {"model_type": "clip", "architectures": ["CLIPModel"]}
    base, fine = {"logit_scale": torch.tensor(2.0).half()}, {"logit_scale": torch.tensor(2.5).half()}
    assert vector_of(tmp_path, (base, config), (fine, config))["logit_scale"] == 0.5


# --- ties -----------------------------------------------------------------------------------------

TIES = {
    "T5": (
        "T5ForConditionalGeneration",
        "shared.weight",
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    ),
    "BART": (
        "BartForConditionalGeneration",
        "model.shared.weight",
        ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
    ),
    "Whisper": ("WhisperForConditionalGeneration", "model.decoder.embed_tokens.weight", ["proj_out.weight"]),
    "RoBERTa": ("RobertaForMaskedLM", "roberta.embeddings.word_embeddings.weight", ["lm_head.decoder.weight"]),
    "RoBERTa's bias": ("RobertaForMaskedLM", "lm_head.bias", ["lm_head.decoder.bias"]),
    "BERT": ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
    "Qwen2": ("Qwen2ForCausalLM", "model.embed_tokens.weight", ["lm_head.weight"]),
}


def tied(saved, kind: str, source: str, names: list[str]) -> tuple[dict, dict, dict]:
    """(tensors with the tied ones spelled out, without, config)."""
    tensors, config = saved(kind)
    group = {source, *names}
    shared = next(tensors[n] for n in (source, *names) if n in tensors)
    rest = {n: t for n, t in tensors.items() if n not in group}
    return rest | {n: shared.clone() for n in (source, *names)}, rest | {source: shared}, config


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "nm", "magnitude"])
@pytest.mark.parametrize("kind, source, names", TIES.values(), ids=TIES)
def test_one_mask_for_tied_tensors(saved, tmp_path, kind, source, names, method):
    """Spelled out by both models: equal afterwards, in every method."""
    out, _, config = tied(saved, kind, source, names)
    vector_of(tmp_path, (out, config), (moved(out), config))
    run(
        "prune", "--task_vector_paths", tmp_path / "v", "--save_directories", tmp_path / "p", "--pruning_method", method
    )
    got = load(tmp_path / "p")
    assert not torch.equal(got[source], out[source])
    for name in names:
        assert torch.equal(got[name], got[source]), name


@pytest.mark.parametrize("spelled", ["base", "ft"])
@pytest.mark.parametrize("kind, source, names", TIES.values(), ids=TIES)
def test_ties_spelled_out_by_one(saved, tmp_path, kind, source, names, spelled):
    """The other side's shared tensor stands in; what the fine-tuned model spells out must be equal."""
    out, bare, config = tied(saved, kind, source, names)
    base, fine = (out, moved(bare)) if spelled == "base" else (bare, moved(out))
    vector = vector_of(tmp_path, (base, config), (fine, config))
    for name, tensor in base.items():
        theirs = fine.get(name, fine[source])
        assert torch.equal(vector[name], (theirs.float() - tensor.float()).half()), name


def test_a_tied_tensor_that_differs(saved, tmp_path):
    """T5 with an encoder embedding of its own: refused by name, nothing is left."""
    out, bare, config = tied(saved, *TIES["T5"])
    fine = moved(out) | {"encoder.embed_tokens.weight": torch.ones_like(out["shared.weight"])}
    write(tmp_path / "base", bare, config)
    write(tmp_path / "ft", fine, config)
    line = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "ft",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    )
    assert line == (
        f"tensor 'encoder.embed_tokens.weight' in {tmp_path}/ft/model.safetensors differs from 'shared.weight', to "
        "which the base ties it; take a base that has a head of its own, or leave it out with --skip "
        "'encoder.embed_tokens.weight'"
    )
    assert not (tmp_path / "v").exists()


def test_an_untied_copy_with_an_equal_head(saved, tmp_path, capsys):
    """Tied base without a head; the fine-tuned model's config says untied, its head is the embedding."""
    out, bare, config = tied(saved, *TIES["Qwen2"])
    fine = moved(out)
    vector = vector_of(tmp_path, (bare, config), (fine, config | {"tie_word_embeddings": False}))
    same_vector(vector, bare, fine)
    assert "lm_head.weight of " in capsys.readouterr().out


def test_mask_names_of_a_model_that_ties_nothing(saved, tmp_path):
    """Every tensor draws under its own name."""
    tensors, config = saved("LlamaForCausalLM")
    assert all(a == b for a, b in mask_names(open_checkpoint(str(write(tmp_path / "m", tensors, config)))).items())


# --- what is left over ----------------------------------------------------------------------------

EXTRA = {
    "TRL's value head": (
        "LlamaForCausalLM",
        {"v_head.summary.weight": (1, 8), "v_head.summary.bias": (1,)},
        "v_head.*",
    ),
    "a classifier": (
        "RobertaForMaskedLM",
        {"classifier.dense.weight": (8, 8), "classifier.out_proj.weight": (2, 8)},
        "classifier.*",
    ),
    "one tensor": ("LlamaForCausalLM", {"score.weight": (2, 8)}, "score.weight"),
    "biases in every layer": (
        "LlamaForCausalLM",
        {f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)},
        "model.layers.*.self_attn.q_proj.bias",
    ),
}


@pytest.mark.parametrize("wrap", ["", "module."])
@pytest.mark.parametrize("kind, shapes, pattern", EXTRA.values(), ids=EXTRA)
def test_skip(saved, tmp_path, kind, shapes, pattern, wrap):
    """Refused with a command that then works, to the end."""
    tensors, config = saved(kind)
    fine = {wrap + n: t for n, t in (moved(tensors) | {n: torch.ones(s).half() for n, s in shapes.items()}).items()}
    write(tmp_path / "base", tensors, config)
    write(tmp_path / "ft", fine, config)
    arguments = [
        "--finetuned_model_path",
        tmp_path / "ft",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    ]
    line = refusal("extract", *arguments)
    n, count = len(tensors), len(shapes)
    plural = "s" * (count > 1)
    assert line == (
        f"{n} of {n + count} tensors agree; only in {tmp_path}/ft: {wrap}{pattern} ({count} tensor{plural}); "
        f"leave {'them' if count > 1 else 'it'} out with --skip '{wrap}{pattern}'"
    )
    run("extract", *arguments, "--skip", wrap + pattern)
    same_vector(load(tmp_path / "v"), tensors, fine, lambda n: wrap + n)


@pytest.mark.parametrize("save_format", ["model", "task_vector"])
def test_skipped_tensors_keep_the_bases_bits(saved, tmp_path, save_format):
    """Another head: +0.0 in the vector, the base's bits in the pruned model; and prune's own --skip does the same."""
    tensors, config = saved("LlamaForCausalLM")
    fine = moved(tensors)
    lone = {n: t for n, t in fine.items() if not n.startswith("lm_head")} | {"score.weight": torch.ones(2, 8).half()}
    vector = vector_of(tmp_path, (tensors, config), (lone, config), "--skip", "lm_head.*", "score.weight")
    assert not vector["lm_head.weight"].view(torch.int16).any()
    run(
        "prune",
        "--task_vector_paths",
        tmp_path / "v",
        "--save_directories",
        tmp_path / "p",
        "--n",
        2,
        "--m",
        2,
        "--skip",
        "*.q_proj.weight",
        "--save_format",
        save_format,
    )
    got = load(tmp_path / "p")
    for name in tensors:
        if "q_proj" in name or "lm_head" in name:
            want = tensors[name] if save_format == "model" else torch.zeros_like(tensors[name])
            assert torch.equal(got[name], want), name
        else:
            want = vector[name] if save_format == "task_vector" else tensors[name].float() + vector[name].float()
            assert torch.equal(got[name], want.half()), name


def test_a_pattern_that_matches_nothing(saved, tmp_path):
    """A typing error, not a wish."""
    tensors, config = saved("LlamaForCausalLM")
    write(tmp_path / "base", tensors, config)
    line = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "base",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
        "--skip",
        "vhead.*",
    )
    assert line == f"--skip 'vhead.*': no tensor of {tmp_path}/base or {tmp_path}/base has such a name; correct it"


def test_a_language_model_of_a_larger_one(saved, tmp_path):
    """Less than half of the base, and wholly in it: what is left over is named, and --skip leaves it out."""
    tensors, config = saved("LlavaForConditionalGeneration")
    _, text = saved("LlamaForCausalLM")
    fine = {n.removeprefix("language_model."): t for n, t in moved(tensors).items() if n.startswith("language_model.")}
    assert 2 * len(fine) < len(tensors)
    write(tmp_path / "base", tensors, config)
    write(tmp_path / "ft", fine, text)
    flags = [
        "--finetuned_model_path",
        tmp_path / "ft",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    ]
    advice = "--skip 'multi_modal_projector.*' 'vision_tower.*'"
    assert refusal("extract", *flags).endswith(f"; leave them out with {advice}")
    run("extract", *flags, "--skip", "multi_modal_projector.*", "vision_tower.*")
    vector = load(tmp_path / "v")
    text_model = {f"language_model.{n}": t for n, t in fine.items()}
    same_vector({n: vector[n] for n in text_model}, {n: tensors[n] for n in text_model}, text_model)
    assert not any(vector[n].any() for n in tensors if not n.startswith("language_model."))


@pytest.mark.parametrize("where", ["base", "ft", "both"])
def test_positions_that_the_model_makes_itself(saved, tmp_path, where):
    """Marian's sinusoids are parameters that its class never saves; older files hold them."""
    tensors, config = saved("MarianMTModel")
    positions = {f"model.{part}.embed_positions.weight": torch.rand(16, 8).half() for part in ("encoder", "decoder")}
    fine = moved(tensors)
    base, other = tensors | (positions if where != "ft" else {}), fine | (positions if where != "base" else {})
    vector = vector_of(tmp_path, (base, config), (other, config))
    assert vector.keys() == base.keys() and not any(vector[n].any() for n in positions if n in vector)
    same_vector({n: vector[n] for n in tensors}, tensors, fine)


def test_unrelated_models(tmp_path):
    """Where hardly anything agrees, no flag is advised."""
    a, b = {f"x.{i}.w": torch.ones(2) for i in range(9)}, {f"y.{i}.v": torch.ones(2) for i in range(9)}
    write(tmp_path / "a", a, {})
    write(tmp_path / "b", b, {})
    line = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "b",
        "--base_model_path",
        tmp_path / "a",
        "--save_path",
        tmp_path / "v",
    )
    assert line == (
        f"0 of 18 tensors agree; only in {tmp_path}/b: y.* (9 tensors); only in {tmp_path}/a: x.* (9 tensors); "
        f"is {tmp_path}/b a fine-tuned model of {tmp_path}/a?"
    )


def test_patterns_match_nothing_that_agrees():
    """A pattern that would take an agreeing tensor with it is not folded."""
    assert patterns(["l.0.b", "l.2.b"], ["l.0.w", "l.1.w", "l.1.b", "l.2.w"]) == {"l.0.b": 1, "l.2.b": 1}
    assert patterns(["l.0.b", "l.2.b"], ["l.0.w", "l.2.w"]) == {"l.*.b": 2}
    assert patterns(["v.w", "v.b"], ["l.w"]) == {"v.*": 2}


def test_nothing_is_taken_off_names_that_agree():
    """The plain names are preferred."""
    assert unwrapped(["a.w", "b.w"], str, {"a.w", "b.w"}) == ({"a.w": "a.w", "b.w": "b.w"}, "")
    assert unwrapped(["m.a.w", "v.w"], str, {"a.w"})[1] == "m."


def test_match_says_what_it_paired(saved, tmp_path):
    """A frozen Match: base names to the other's tensors."""
    tensors, config = saved("LlamaForCausalLM")
    base = open_checkpoint(str(write(tmp_path / "base", tensors, config)))
    other = open_checkpoint(str(write(tmp_path / "o", {f"module.{n}": t for n, t in tensors.items()}, config)))
    matched = match(base, other)
    assert {n: t.name for n, t in matched.pairs.items()} == {n: f"module.{n}" for n in tensors}
    assert matched.notes == (f"{tmp_path}/o: 'module.' was taken off its tensors' names",)
