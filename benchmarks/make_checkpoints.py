#!/usr/bin/env python3
"""Make a base model and two fine-tuned models of Mistral-7B's width, seeded, without a download.

    python benchmarks/make_checkpoints.py --save_path models/bench --layers 4

4 layers have 1.13 billion parameters (2.3 GB in float16), 32 layers are Mistral-7B (14.5 GB). Values are normal:
weights with standard deviation 0.02, what fine-tuning adds with 0.002, as in the models of the paper.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import positive_int
from common.exits import run
from common.shards.layout import index_text, plan_shards, tensor_bytes

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000
NAMES = ["base", "finetuned1", "finetuned2"]
POOL = 1 << 24  # random values, made once; each tensor starts at another place in them


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a Mistral of this many layers."""
    named = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        named |= {
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
        }
    return named | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def model_bytes(layers: int) -> int:
    """Bytes of one such model in float16: model_bytes(32) -> 14483464192."""
    return sum(tensor_bytes("F16", shape) for shape in shapes(layers).values())


def config(layers: int) -> dict:
    """config.json of such a model."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }


def write_model(directory: Path, layers: int, pools: list[np.ndarray]) -> None:
    """A float16 checkpoint whose values are the sum of the pools, each read from another place per tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    shards = plan_shards([(name, "F16", shape) for name, shape in shapes(layers).items()], 5 * 10**9)
    for shard in shards:
        with open(directory / shard.filename, "wb") as file:
            file.write(shard.header)
            for slot in shard.slots:
                left, at = slot.nbytes // 2, len(slot.name) * 7919 % POOL
                while left:
                    part = [np.resize(np.roll(pool, -at), min(left, POOL)) for pool in pools]
                    values = part[0] if len(part) == 1 else part[0] + part[1]
                    file.write(values.astype(np.float16).tobytes())
                    left -= values.size
                    at += 104729
    (directory / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    if len(shards) > 1:
        (directory / "model.safetensors.index.json").write_text(index_text(shards))


def pool(part: int, deviation: float) -> np.ndarray:
    """Normal values, float32 [POOL]; part 0 is the base, part i what fine-tuned model i adds."""
    return np.random.default_rng([0, part]).standard_normal(POOL, dtype=np.float32) * np.float32(deviation)


def make(directory: Path, layers: int, names: list[str]) -> None:
    """Those of base, finetuned1 and finetuned2 that are named, under `directory`."""
    for name in names:
        changes = [pool(int(name[-1]), 0.002)] if name != "base" else []
        write_model(directory / name, layers, [pool(0, 0.02), *changes])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_path", type=Path, required=True, help="where the models go")
    parser.add_argument("--layers", type=positive_int, default=4, help="layers; 32 are Mistral-7B (default: 4)")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="which models (default: all)")
    args = parser.parse_args(argv)
    make(args.save_path, args.layers, args.names)
    print(f"wrote {', '.join(args.names)} to {args.save_path} ({model_bytes(args.layers) / 1e9:.1f} GB each)")


if __name__ == "__main__":
    run(main)
