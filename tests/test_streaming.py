"""Streamed merges, end to end: mergekit's bits, the chain's masks, no tensor dropped, the same bytes however it is
cut.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import extract, files, load, prune, state, write
from conftest import ROOT

import merge_and_evaluate_7b as script
from common.errors import DataError
from common.pruners import kernels
from common.pruners.kernels import program
from common.shards import stream
from merge_and_evaluate import merge_tensor, merging
from merge_and_evaluate.recipes import read_recipe, with_weights

SHAPES = {
    "lm_head.weight": (11, 7),
    "model.embed_tokens.weight": (11, 7),
    **{f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": (13, 9) for i in range(3) for e in range(2)},
    "model.norm.weight": (7,),
    "vision_tower.patch_embed.weight": (5, 3, 2, 2),
}
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "cabs", "magnitude", "random")


@pytest.fixture
def near_models(tmp_path, monkeypatch) -> Path:
    """A working directory with base and five models near it, of an architecture that nobody knows, one file or
    several."""
    monkeypatch.chdir(tmp_path)
    base = state(0, shapes=SHAPES)
    write(tmp_path / "base", base)
    for seed, name in enumerate("abcde", 1):
        write(tmp_path / name, state(seed, shapes=SHAPES, near=base), files=1 + seed % 3)
    return tmp_path


def recipe(method: str, models=("a", "b"), weights=(0.6, 0.5), base="./base", out="float16", **more) -> dict:
    """A recipe; `beside` goes beside every model, everything else under `parameters`."""
    beside = more.pop("beside", {})
    listed = [
        {"model": f"./{name}", "parameters": {"weight": weight, **beside}}
        for name, weight in zip(models, weights, strict=False)
    ]
    base = None if method == "linear" else base  # which would be summed as well, and needs a weight
    config = {"merge_method": method, "base_model": base, "models": listed, "dtype": "float32", "out_dtype": out}
    return {k: v for k, v in {**config, "parameters": more}.items() if v}


def merge(config: dict, save: str, *flags) -> dict[str, torch.Tensor]:
    """Merge by a recipe -> what was written."""
    Path("r.yml").write_text(yaml.safe_dump(config))
    script.main(["--recipe", "r.yml", "--save_path", save, "--merge_only", *map(str, flags)])
    return load(Path(save))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


# --- the right result -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("parameters", [{}, {"normalize": True}, {"lambda": 0.7}])
def test_task_arithmetic_is_the_oracles(near_models, out, count, parameters):
    """Every bit of the sum, in mergekit's order of operations; test_sums.py holds that oracle to mergekit itself."""
    import merge_oracle

    from common.shards.headers import DTYPE_CODES

    weights = (0.6, -0.5, 1.2, 0.3, 0.9)[:count]
    found = merge(recipe("task_arithmetic", "abcde"[:count], weights, out=out, **parameters), "out")
    models = [load(near_models / name) for name in "abcde"[:count]]
    for name, base in load(near_models / "base").items():
        columns = [
            merge_oracle.to_values(bits(m[name]).numpy().view(np.uint16).ravel(), "F16")
            for m in [{name: base}, *models]
        ]
        want = merge_oracle.delta_sum(
            columns[0],
            columns[1:],
            weights,
            normalize=bool(parameters.get("normalize")),
            scale=parameters.get("lambda", 1.0),
        )
        code = DTYPE_CODES[out]
        wanted = [merge_oracle.to_bits(value, code) for value in want]
        raw = bits(found[name]).numpy().view(np.uint32 if code == "F32" else np.uint16).ravel()
        assert raw.tolist() == wanted, name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_mergekit_merges_whole_models_alike(tmp_path, monkeypatch, models, method):
    """The same recipe through both engines, on an architecture that mergekit knows."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "wild", "west"):
        (tmp_path / name).symlink_to(models / name)
    beside = {"density": 0.5} if method == "ties" else {}
    config = recipe(method, ("wild", "west"), (0.6, 0.5), beside=beside)
    ours, theirs = merge(config, "ours"), merge(config, "theirs", "--engine", "mergekit")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        same = (bits(tensor) == bits(theirs[name])) | ((tensor == 0) & (theirs[name] == 0))
        assert same.all() if method != "ties" else same.float().mean() > 0.98, name  # equal magnitudes at the threshold
    report = json.loads(Path("ours/merge_report.json").read_text())
    assert (
        report["engine"] == "stream"
        and json.loads(Path("theirs/merge_report.json").read_text())["engine"] == "mergekit"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags", "parameters"),
    [
        ("cabs", ["--n", 2, "--m", 8], {"n": 2, "m": 8}),
        ("cabs", ["--n", 3, "--m", 4, "--no-conflict_aware"], {"n": 3, "m": 4, "conflict_aware": False}),
        ("magnitude", ["--pruning_method", "magnitude", "--sparsity_level", 0.7], {"density": 0.3}),
        (
            "magnitude",
            ["--pruning_method", "magnitude", "--sparsity_level", 0.5, "--conflict_aware"],
            {"density": 0.5, "conflict_aware": True},
        ),
        ("random", ["--pruning_method", "random", "--sparsity_level", 0.75, "--seed", 3], {"density": 0.25, "seed": 3}),
    ],
)
def test_one_pass_is_the_chain(near_models, method, flags, parameters):
    """Nothing outside the chain's masks changes, and the totals are the chain's (the sums: test_merge_methods.py)."""
    for name in "ab":
        extract(name, "base", f"v{name}")
    prune(["va", "vb"], ["pa", "pb"], *flags)
    ours, base = merge(recipe(method, **parameters), "out"), load(near_models / "base")
    pruned, touched = [load(near_models / name) for name in ("pa", "pb")], 0
    for name, tensor in ours.items():
        changed = bits(tensor) != bits(base[name])
        masked = (bits(pruned[0][name]) != bits(base[name])) | (bits(pruned[1][name]) != bits(base[name]))
        assert not (changed & ~masked).any(), name
        touched += int(changed.sum())
    assert touched
    report = json.loads(Path("out/merge_report.json").read_text())
    for vector, directory in zip(report["vectors"], ("pa", "pb"), strict=True):
        totals = json.loads((near_models / directory / "prune_report.json").read_text())["totals"]
        assert vector["totals"]["kept"] == totals["kept"] and vector["totals"]["l2_share"] == totals["l2_share"]
        assert list(vector["totals"]["overlap"].values()) == list(totals["overlap"].values())


def test_every_tensor_of_the_base_is_there(near_models):
    """Mixtures of experts, vision towers: by names alone."""
    for method in METHODS:
        found = merge(recipe(method), f"out_{method}")
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES, method


def test_where_nothing_changes_the_base_keeps_its_bits(near_models):
    base = state(0, shapes=SHAPES)
    base["model.norm.weight"][:3] = -0.0
    write(near_models / "zero", base)
    write(near_models / "same", base)
    for method in METHODS[1:]:
        config = recipe(method, ["same"], [0.7], base="./zero")
        for name, tensor in merge(config, f"zero_{method}").items():
            assert torch.equal(bits(tensor), bits(base[name])), (method, name)


def test_consensus_and_parameters_by_model_and_name(near_models):
    """n and m per model, a weight filtered by name, a gradient over layers: every value is the one that mergekit
    reads."""
    config = recipe("cabs", m=8)
    config["models"][0]["parameters"] |= {"n": 2}
    config["models"][1]["parameters"] |= {
        "n": 4,
        "weight": [{"filter": "experts.0", "value": 0.0}, {"value": [0.0, 1.0]}],
    }
    found, base = merge(config, "out", "--engine", "stream"), load(near_models / "base")
    alone = merge(recipe("cabs", ["a"], [0.6], n=2, m=8), "alone")
    for name in found:
        if "experts.0" in name or "layers.0." in name:  # weight 0: only the first model changes anything
            assert torch.equal(bits(found[name]), bits(alone[name])), name
        elif "layers.2." in name:
            assert not torch.equal(bits(found[name]), bits(alone[name])), name
    signed = merge(recipe("cabs", n=4, m=8, conflict_aware=False, consensus="sign"), "signed")
    plain = merge(recipe("cabs", n=4, m=8, conflict_aware=False), "plain")
    assert any(not torch.equal(signed[name], plain[name]) for name in base)


# --- the same bytes however it is cut ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_blocks_threads_or_shards(near_models, monkeypatch, method):
    beside = {"density": 0.4} if method in ("ties", "dare_linear", "dare_ties") else {}
    config = recipe(method, "abcde", (0.6, 0.5, 0.4, -0.3, 0.2), beside=beside)
    whole = merge(config, "whole")
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(program, "STRETCH", 16)
    monkeypatch.setattr("common.pruners.masks._GROUPS", 1)
    monkeypatch.setattr(stream, "worker_count", lambda: 1)
    cut = merge(config, "cut", "--max_shard_size", 300)
    assert len(list(Path("cut").glob("*.safetensors"))) > 5
    for name, tensor in whole.items():
        assert torch.equal(bits(tensor), bits(cut[name])), name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_draws_that_are_kept_are_those_that_are_drawn_again(near_models, monkeypatch, method):
    """DARE's masks go packed from the first pass to the second; where there is no room for them they are drawn
    again."""
    monkeypatch.setattr(program, "STRETCH", 32)
    config, draws, real = recipe(method, "abc", (0.6, 0.5, -0.3), beside={"density": 0.4}), [], merge_tensor.Masks.drawn
    monkeypatch.setattr(merge_tensor.Masks, "drawn", lambda self, *a: (draws.append(1), real(self, *a))[1])
    kept = merge(config, "kept")
    once = len(draws)
    monkeypatch.setattr(stream, "SHELVES", 0)
    again = merge(config, "again")
    assert len(draws) == 3 * once
    for name, tensor in kept.items():
        assert torch.equal(bits(tensor), bits(again[name])), name


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(near_models):
    config = recipe("ties", beside={"density": 0.4})
    merge(config, "one", "--max_shard_size", 600)
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc-per-node",
        "2",
        "--",
        str(ROOT / "merge_and_evaluate_7b.py"),
    ]
    flags = ["--recipe", "r.yml", "--save_path", "two", "--merge_only", "--max_shard_size", "600"]
    done = subprocess.run(
        command + flags, cwd=near_models, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote two") == 1
    ours, theirs = files(near_models / "one"), files(near_models / "two")
    assert {k: v for k, v in ours.items() if "safetensors" in k} == {
        k: v for k, v in theirs.items() if "safetensors" in k
    }


def test_a_killed_merge_resumes(near_models, monkeypatch):
    """The first shards are complete when it stops; the same command, spelled otherwise, does the rest."""
    config, real, calls = recipe("cabs", n=2, m=8), merge_tensor.merge_tensor, []
    merge(config, "undisturbed", "--max_shard_size", 300)

    def stops(*arguments):
        calls.append(arguments[0].name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("merge_and_evaluate.streaming.merge_tensor", stops)
    monkeypatch.setattr(stream, "worker_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        merge(config, "out", "--max_shard_size", 300)
    assert not Path("out").exists() and Path("out.part").is_dir()
    before = len(calls)
    Path("x").mkdir()
    merge(config, "./x/../out", "--max_shard_size", 300)
    assert 0 < len(calls) - before < len(SHAPES)
    ours, theirs = files(near_models / "out"), files(near_models / "undisturbed")
    assert {k: v for k, v in ours.items() if "safetensors" in k} == {
        k: v for k, v in theirs.items() if "safetensors" in k
    }


def test_a_sweep_finds_thresholds_once(near_models, monkeypatch):
    """What does not depend on the weights is found for the first candidate and kept: the same bytes without another
    search."""
    searched = []
    real = merge_tensor.Masks.find_thresholds
    monkeypatch.setattr(merge_tensor.Masks, "find_thresholds", lambda self, *a: (searched.append(1), real(self, *a))[1])
    Path("r.yml").write_text(yaml.safe_dump(recipe("magnitude", density=0.3)))
    settings = merging.MergeSettings()
    first = merging.plan_merge(read_recipe("r.yml"), "first", settings)
    merging.merge(first, merging.input_digests(first), settings, False)
    count = len(searched)
    from dataclasses import replace

    second = replace(first, recipe=with_weights(first.recipe, (1.1,)), save_path=Path("second"))
    merging.merge(second, merging.input_digests(second), settings, False)
    assert len(searched) == count > 0
    alone = merge(recipe("magnitude", weights=(1.1, 1.1), density=0.3), "alone")
    assert all(torch.equal(bits(alone[name]), bits(tensor)) for name, tensor in load(Path("second")).items())


# --- refusals, all before anything is published ------------------------------------------------------


def refused(config: dict, *flags) -> str:
    with pytest.raises(DataError) as error:
        merge(config, "out", *flags)
    assert not Path("out").exists() and not Path("out.part").exists()
    return str(error.value)


def test_what_does_not_stream_says_which_line(near_models):
    config = {"merge_method": "slerp", "base_model": "./base", "models": [{"model": "./a"}], "parameters": {"t": 0.5}}
    line = refused(config | {"dtype": "float32"}, "--engine", "stream")
    assert (
        line.startswith("r.yml: does not stream: merge_method: slerp is not one of linear") and "--engine auto" in line
    )


def test_bad_values_are_refused_by_name(near_models):
    broken = state(1, shapes=SHAPES)
    broken["model.norm.weight"][3] = float("nan")
    write(near_models / "broken", broken)
    for method in METHODS:
        line = refused(recipe(method, ("broken", "b")))
        assert line.startswith("tensor 'model.norm.weight' in ") and "NaN or infinity" in line, (method, line)
    line = refused(recipe("task_arithmetic", weights=(1e7, 1e7)))
    assert "of the merge: a sum is beyond the largest float16; lower the weights" in line


def test_other_shapes_are_refused_before_a_weight_is_read(near_models, monkeypatch):
    write(near_models / "large", state(1, shapes=SHAPES | {"model.norm.weight": (8,)}))
    monkeypatch.setattr(stream, "run", lambda *_: pytest.fail("a weight was read"))
    assert "'model.norm.weight' is [8] in ./large but [7] in ./base" in refused(recipe("ties", ("a", "large")))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "cabs", "magnitude"])
def test_skipped_tensors_keep_the_base(near_models, capsys, method):
    """--skip: a head of its own and one of another size are left out, the base's tensors keep their bits and dtype."""
    other = load(near_models / "a") | {"v_head.weight": torch.ones(3), "lm_head.weight": torch.ones(12, 7)}
    write(near_models / "other", other)
    config = recipe(method, ("b", "other") if method == "linear" else ("other", "b"), out="bfloat16")
    assert "--skip" in refused(config)
    merged = merge(config, "out", "--skip", "v_head.*", "lm_head.weight")
    assert "left out by --skip" in capsys.readouterr().out
    first = load(near_models / ("b" if method == "linear" else "base"))
    assert merged.keys() == SHAPES.keys() and merged["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(merged["lm_head.weight"], first["lm_head.weight"].to(merged["lm_head.weight"].dtype))
    assert merged["lm_head.weight"].dtype == first["lm_head.weight"].dtype
    plain = merge(recipe(method, ("b", "a") if method == "linear" else ("a", "b"), out="bfloat16"), "plain")
    assert all(torch.equal(merged[name], plain[name]) for name in SHAPES.keys() - {"lm_head.weight"})


def test_skip_does_not_go_with_mergekit(near_models):
    assert "--skip is for streamed merges" in refused(
        recipe("ties"), "--engine", "mergekit", "--skip", "lm_head.weight"
    )
    assert "'x.*'" in refused(recipe("ties"), "--skip", "x.*")


def test_bytes_that_were_recorded_are_held_to(near_models):
    """A pruned model whose copy was damaged: its report knows."""
    extract("a", "base", "va")
    prune(["va"], ["pa"], "--n", 2, "--m", 8)
    path = near_models / "pa" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = refused(recipe("task_arithmetic", ["pa"], [1.0]))
    assert "not the bytes that were recorded when it was written" in line


def test_mergekit_may_not_drop_a_tensor(tmp_path, monkeypatch, models):
    """What mergekit does not know it leaves out without a word; the merge is refused, and says what streams."""
    import shutil

    monkeypatch.chdir(tmp_path)
    for name in ("base", "wild", "west"):
        shutil.copytree(models / name, tmp_path / name)
        shard = sorted((tmp_path / name).glob("*.safetensors"))[0]
        from safetensors.torch import load_file, save_file

        save_file(load_file(shard) | {"adapter.gate.weight": torch.ones(3).half()}, shard, metadata={"format": "pt"})
        index = tmp_path / name / "model.safetensors.index.json"
        if index.exists():
            content = json.loads(index.read_text())
            content["weight_map"]["adapter.gate.weight"] = shard.name
            index.write_text(json.dumps(content))
    config = recipe("task_arithmetic", ("wild", "west"))
    line = refused(config, "--engine", "mergekit")
    assert "mergekit left out 1 of" in line and "adapter.gate.weight (1)" in line and "--engine stream" in line
    assert "adapter.gate.weight" in merge(config, "out")


# --- what lies beside ---------------------------------------------------------------------------------


def test_the_card_says_how_it_was_made(near_models):
    from huggingface_hub import ModelCard

    merge(recipe("cabs", n=2, m=8), "out")
    card = ModelCard.load(Path("out/README.md"))
    assert card.data.base_model == ["base", "a", "b"] and card.data.base_model_relation == "merge"
    assert {"merge", "cabs"} <= set(card.data.tags) and "## Command" in card.text
    assert "merge_method: cabs" in card.text and "| 0.00 % |" in card.text


def test_dry_run_is_true_to_the_byte(near_models, capsys):
    config = recipe("ties", out="float32")
    Path("r.yml").write_text(yaml.safe_dump(config))
    script.main(["--recipe", "r.yml", "--save_path", "out", "--merge_only", "--dry_run"])
    said = capsys.readouterr().out
    assert "engine  stream" in said and not Path("out").exists()
    plan = merging.plan_merge(read_recipe("r.yml"), "out", merging.MergeSettings())
    merge(config, "out")
    assert plan.nbytes == sum(path.stat().st_size for path in Path("out").glob("*.safetensors"))


@pytest.mark.slow
def test_a_streamed_merge_imports_nothing_heavy(near_models):
    for name in ("base", "a", "b"):  # else transformers is asked what the architecture ties
        config = json.loads((near_models / name / "config.json").read_text())
        (near_models / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    Path("r.yml").write_text(yaml.safe_dump(recipe("ties", beside={"density": 0.4})))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import merge_and_evaluate_7b as script; "
        "script.main(['--recipe', 'r.yml', '--save_path', 'out', '--merge_only']); "
        "print(sorted({'torch', 'transformers', 'mergekit', 'lm_eval', 'pydantic', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=near_models, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
