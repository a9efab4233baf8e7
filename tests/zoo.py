"""Tiny models of several architectures as people publish them: layouts, ties, buffers, mixed dtypes, odd sizes."""

from pathlib import Path

import torch
from checkpoints import write

MISTRAL = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=16,
)
QWEN2 = dict(
    vocab_size=67,
    hidden_size=20,
    intermediate_size=31,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=16,
)
GPT2 = dict(vocab_size=53, n_positions=9, n_embd=12, n_layer=2, n_head=4)


def _start(kind: str) -> tuple[dict, dict]:
    """(state dict in float32, config) of a freshly initialised model, tied tensors listed once."""
    import transformers

    family = {"mistral": "Mistral", "qwen2": "Qwen2", "gpt2": "GPT2"}[kind]
    config = getattr(transformers, f"{family}Config")(**{"mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}[kind])
    torch.manual_seed(0)
    suffix = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    model = getattr(transformers, family + suffix)(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind != "mistral":
        del state["lm_head.weight"]
    return state, config.to_dict() | {"architectures": [family + suffix], "dtype": "float32"}


def perturbed(base: dict, seed: int, dtype: torch.dtype) -> dict:
    """A fine-tuned model: a third of the weights as they were, the rest moved, by steps so that some tie."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in base.items():
        step = torch.randint(-9, 10, tensor.shape, generator=generator) / 512
        moved = torch.rand(tensor.shape, generator=generator) < 2 / 3
        noise = 0.003 * torch.randn(tensor.shape, generator=generator)
        out[name] = torch.where(moved, tensor.float() + step + noise * (step > 0), tensor.float()).to(dtype)
    return out


def _with_zeros(state: dict) -> dict:
    """Both zeros, subnormals of float16 and halfway cases among the weights of each tensor."""
    special = torch.tensor([-0.0, 0.0, 3e-6, -3e-8, 1 + 2**-11, -0.0, 1e-40])
    for tensor in state.values():
        tensor.view(-1)[: 2 * len(special) : 2] = special[: (tensor.numel() + 1) // 2]
    return state


def make(kind: str, folder: Path) -> Path:
    """folder/base, a, b: one architecture, each model in another layout and dtype.

    mistral  untied; rotary inv_freq in base and a; a in three shards, b one .bin
    qwen2    tied, biases; a spells the head out, equal to the embedding; b a sharded .bin; base norms in float32
    gpt2     tied, wide buffers of booleans and integers in the base alone; base spells the head out
    """
    state, config = _start(kind)
    half = {name: tensor.bfloat16() for name, tensor in _with_zeros(state).items()}
    base, a, b = half, perturbed(half, 1, torch.bfloat16), perturbed(half, 2, torch.float32)
    files = {"base": 1, "a": 3, "b": 1}
    if kind == "mistral":
        inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 1e-3, float("inf")])}
        base, a = base | inv_freq, a | inv_freq
    if kind == "qwen2":
        base = {n: t.float() if "norm" in n else t for n, t in base.items()}
        a = a | {"lm_head.weight": a["model.embed_tokens.weight"].clone()}
        files = {"base": 2, "a": 1, "b": 3}
    if kind == "gpt2":
        causal = torch.ones(1, 1, 9, 9).tril().bool()
        base = {"lm_head.weight": base["transformer.wte.weight"].clone()} | base
        base |= {"transformer.h.0.attn.bias": causal, "transformer.position_ids": torch.arange(9)}
        files = {"base": 1, "a": 2, "b": 1}
    write(folder / "base", base, config | {"dtype": "bfloat16"}, files["base"])
    write(folder / "a", a, config | {"dtype": "bfloat16"}, files["a"])
    write(folder / "b", b, config, files["b"], ".bin")
    return folder
