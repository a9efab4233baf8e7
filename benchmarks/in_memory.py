#!/usr/bin/env python3
"""The obvious n:m prune, for comparison: load everything, topk and scatter, save everything.

    python benchmarks/in_memory.py BASE VECTOR1 VECTOR2 OUT1 OUT2 N M

What a first version of the prune script looks like. It breaks ties as topk happens to, keeps the last, shorter run
whole, and needs all models in memory.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load(directory: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: v for path in sorted(Path(directory).glob("*.safetensors")) for k, v in load_file(path).items()}


def nm_mask(tensor: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n largest of every m consecutive elements: (any shape) -> bool, the same shape."""
    full = tensor.numel() // m * m
    runs = tensor.flatten()[:full].abs().view(-1, m)
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    kept = torch.zeros_like(runs, dtype=torch.bool).scatter_(1, runs.topk(n, dim=1).indices, True)
    mask[:full] = kept.flatten()
    return mask.view_as(tensor)


def main(base_path, path1, path2, out1, out2, n, m) -> None:
    base, first, second = load(base_path), load(path1), load(path2)
    pruned1, pruned2 = {}, {}
    for name, tensor in base.items():
        mask = nm_mask(first[name], n, m)
        pruned1[name] = tensor + first[name] * mask
        rest = second[name] * ~mask
        pruned2[name] = tensor + rest * nm_mask(rest, n, m)
    for out, tensors in ((out1, pruned1), (out2, pruned2)):
        Path(out).mkdir()
        save_file(tensors, Path(out) / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:6], int(sys.argv[6]), int(sys.argv[7]))
