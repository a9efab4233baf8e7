"""Models and settings at the edges of what is allowed: empty tensors, scalars, strange names, m beyond any tensor."""

import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from checkpoints import extract, load, prune, refusal, write
from conftest import ROOT

TENSORS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "one": torch.ones(1),
    "ünï \"x'\\": torch.arange(5.0),
    "a/../b": torch.linspace(-1, 1, 301),
    "position_ids": torch.arange(4).unsqueeze(0),
}


@pytest.fixture
def odd(tmp_path) -> Path:
    """A base, two fine-tuned models and their vectors, all of TENSORS."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in TENSORS.items()}
    write(tmp_path / "base", half, {"model_type": "x", "name": "ünï"})
    for i, name in enumerate("ab", 1):
        tensors = {n: t + 0.01 * i * t.abs() if t.is_floating_point() else t for n, t in half.items()}
        write(tmp_path / name, tensors, {}, 2 if i == 1 else 1, ".bin" if i == 2 else ".safetensors")
        extract(tmp_path / name, tmp_path / "base", tmp_path / f"v{name}", "--max_shard_size", "20B")
    return tmp_path


FLAGS = {
    "nm": dict(n=1, m=4),
    "all of them": dict(n=4, m=4),
    "m beyond any tensor": dict(n=3, m=2**40),
    "m beyond 53 bits": dict(n=2**62, m=2**62 + 1),
    "magnitude of all": dict(pruning_method="magnitude", sparsity_level=0.0),
    "magnitude of hardly any": dict(pruning_method="magnitude", sparsity_level=0.999999),
    "random": dict(pruning_method="random", sparsity_level=0.5, seed=-(10**30)),
    "random of hardly any": dict(pruning_method="random", sparsity_level=1 - 2**-53),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_odd_tensors_and_settings(odd, flags):
    """Three vectors, one of them twice, against the oracle."""
    outs, vectors = [odd / f"p{i}" for i in range(3)], [odd / "va", odd / "vb", odd / "va"]
    more = [part for name, value in flags.items() for part in (f"--{name}", value)]
    more = [f"{a}={b}" for a, b in zip(more[::2], more[1::2], strict=True)]  # a value may begin with a minus
    prune(vectors, outs, "--max_shard_size", "100B", *more)
    base, read, written = load(odd / "base"), [load(v) for v in vectors], [load(out) for out in outs]
    settings = {"method" if name == "pruning_method" else name: value for name, value in flags.items()}
    for name, tensor in base.items():
        if name == "position_ids":
            assert all(oracle.same(out[name], tensor) for out in written)
            continue
        masks = oracle.masks([vector[name] for vector in read], name, **settings)
        for out, vector, mask in zip(written, read, masks, strict=True):
            assert oracle.same(out[name], oracle.model_tensor(tensor, vector[name], mask, torch.tensor(1.0))), name


@pytest.mark.slow
def test_a_locale_without_utf8(odd):
    """Files are UTF-8 whatever the locale says; a refusal still is one line."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def start(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / "convert_dtype.py", *map(str, arguments)],
            env=environment,
            capture_output=True,
            cwd=odd,
        )

    done = start("--model_path", odd / "base", "--save_path", odd / "out", "--max_shard_size", "20B")
    assert done.returncode == 0, done.stderr
    assert "ünï" in (odd / "out" / "config.json").read_text(encoding="utf-8")
    assert load(odd / "out").keys() == TENSORS.keys()
    done = start("--model_path", odd / "ünï", "--save_path", odd / "out2")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and done.stderr.isascii()
    assert done.stderr.endswith(b": not UTF-8, or a locale without it; rename it, or set LC_ALL=C.UTF-8\n")
    done = start("--model_path", odd / "nothing", "--save_path", odd / "out2")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"no such directory" in done.stderr


@pytest.mark.parametrize(("place", "meant"), [(".", "."), ("./", "."), ("..", ".."), ("sub/..", ".")])
def test_the_working_directory_is_no_output(odd, monkeypatch, place, meant):
    """Not even with --overwrite."""
    here = odd / "here" / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    line = refusal("convert", "--model_path", odd / "base", "--save_path", place, "--overwrite")
    assert line == (f"{meant}: is the working directory or holds it; give the output a directory of its own")
    assert here.is_dir()
