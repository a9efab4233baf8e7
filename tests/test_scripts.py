"""The chain on tiny models of three architectures, bit for bit against the oracle, whatever the layout."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import zoo
from checkpoints import SHAPES, chain, extract, files, load, prune, prune_arguments, refusal, run, state, write
from conftest import DEVICES, ROOT

KINDS = ["mistral", "qwen2", "gpt2"]
METHODS = {
    "nm": ["--n", 1, "--m", 4],
    "nm beyond half": ["--n", 3, "--m", 4, "--rescale"],
    "nm alone": ["--n", 64, "--m", 256, "--no-conflict_aware"],
    "magnitude": ["--pruning_method", "magnitude", "--sparsity_level", 0.9],
    "magnitude in turn": ["--pruning_method", "magnitude", "--sparsity_level", 0.3, "--conflict_aware"],
    "random": ["--pruning_method", "random", "--sparsity_level", 0.6, "--rescale", "--seed", 7],
    "random in turn": ["--pruning_method", "random", "--conflict_aware"],
}


def is_buffer(name: str, tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or name.endswith("inv_freq")


def options(flags: list) -> dict:
    """The oracle's arguments for a list of flags: options(["--n", 1, "--rescale"]) -> {"n": 1, "rescale": True}."""
    found = {}
    for i, flag in enumerate(flags):
        if str(flag).startswith("--"):
            plain = i + 1 == len(flags) or str(flags[i + 1]).startswith("--")
            found[flag[2:].removeprefix("no-")] = not flag.startswith("--no-") if plain else flags[i + 1]
    if "pruning_method" in found:
        found["method"] = found.pop("pruning_method")
    return found


def expected_vector(base: dict, finetuned: dict, dtype=torch.float16) -> dict:
    """What extract writes: a missing head is the embedding's twin; buffers are the base's."""
    embedding = next(name for name in base if name.endswith(("embed_tokens.weight", "wte.weight")))
    return {
        name: tensor
        if is_buffer(name, tensor)
        else oracle.extract(finetuned.get(name, finetuned[embedding]), tensor, dtype)
        for name, tensor in base.items()
    }


def expected_pruned(base: dict, vectors: list[dict], save_format="model", tied=True, **flags) -> list[dict]:
    """What prune writes for each vector; with `tied` a head draws random masks under the embedding's name."""
    rescale = flags.pop("rescale", False)
    embedding = next(name for name in base if name.endswith(("embed_tokens.weight", "wte.weight")))
    scale = oracle.scale_of(
        flags.get("method", "nm"), flags.get("n", 64), flags.get("m", 256), flags.get("sparsity_level", 0.75), rescale
    )
    out = [{} for _ in vectors]
    for name, tensor in base.items():
        if is_buffer(name, tensor):
            for written in out:
                written[name] = tensor
            continue
        drawn = embedding if tied and name == "lm_head.weight" else name
        masks = oracle.masks([vector[name] for vector in vectors], drawn, **flags)
        for written, vector, mask in zip(out, vectors, masks, strict=True):
            if save_format == "model":
                written[name] = oracle.model_tensor(tensor, vector[name], mask, scale)
            else:
                written[name] = oracle.vector_tensor(vector[name], mask, scale)
    return out


def expect(directory: Path, want: dict) -> None:
    """A directory holds exactly the wanted tensors, bit for bit."""
    found = load(directory)
    assert found.keys() == want.keys()
    for name in want:
        assert oracle.same(found[name], want[name]), f"{directory.name}: {name}"


@pytest.fixture(scope="module")
def zoos(tmp_path_factory) -> dict[str, Path]:
    """For each architecture a folder with base, a, b; half = base in float16; va, vb = the vectors from half."""
    folders = {}
    for kind in KINDS:
        folder = folders[kind] = zoo.make(kind, tmp_path_factory.mktemp("zoo") / kind)
        run("convert", "--model_path", folder / "base", "--save_path", folder / "half", "--max_shard_size", "3KB")
        for name in "ab":
            extract(
                folder / name, folder / "half", folder / f"v{name}", "--max_shard_size", "2KB" if name == "a" else "5GB"
            )
    return folders


# --- bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_convert_and_extract(zoos, kind):
    """float16 of every parameter, buffers as they were; both vectors; the tokenizer's owner recorded."""
    folder, base = zoos[kind], load(zoos[kind] / "base")
    half = {n: t if is_buffer(n, t) else oracle.convert(t, torch.float16) for n, t in base.items()}
    expect(folder / "half", half)
    for name in "ab":
        expect(folder / f"v{name}", expected_vector(half, load(folder / name)))
        record = json.loads((folder / f"v{name}" / "task_vector.json").read_text())
        assert record["base_model_path"] == str((folder / "half").resolve())
        assert record["finetuned_model_path"] == str((folder / name).resolve())
        assert record["tensors"].keys() == half.keys()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_prune(zoos, tmp_path, kind, method, device):
    """Two vectors, base + pruned vector in the base's dtype."""
    folder = zoos[kind]
    run(
        "prune",
        "--task_vector_path1",
        folder / "va",
        "--task_vector_path2",
        folder / "vb",
        "--save_directory1",
        tmp_path / "pa",
        "--save_directory2",
        tmp_path / "pb",
        "--max_shard_size",
        "4KB",
        "--device",
        device,
        *METHODS[method],
    )
    base, vectors = load(folder / "half"), [load(folder / "va"), load(folder / "vb")]
    want = expected_pruned(base, vectors, tied=kind != "mistral", **options(METHODS[method]))
    expect(tmp_path / "pa", want[0])
    expect(tmp_path / "pb", want[1])


@pytest.mark.slow
def test_three_vectors_mixed_dtypes_both_formats(zoos, tmp_path):
    """A base of two dtypes used as it is, vectors in bfloat16, three of them, as models and as vectors."""
    folder, vectors = zoos["qwen2"], []
    for name, source in (("1", "a"), ("2", "b"), ("3", "half")):
        extract(folder / source, folder / "base", tmp_path / name, "--dtype", "bfloat16")
        vectors.append(load(tmp_path / name))
    base = load(folder / "base")
    assert len({tensor.dtype for tensor in base.values()}) == 2
    for save_format in ("model", "task_vector"):
        outs = [tmp_path / f"{save_format}{i}" for i in range(3)]
        prune([*(tmp_path / n for n in "123")], outs, "--n", 1, "--m", 4, "--rescale", "--save_format", save_format)
        want = expected_pruned(base, vectors, save_format, n=1, m=4, rescale=True)
        for out, tensors in zip(outs, want, strict=True):
            expect(out, tensors)
    config = json.loads((tmp_path / "model0" / "config.json").read_text())
    assert config == json.loads((folder / "base" / "config.json").read_text())
    assert json.loads((tmp_path / "task_vector0" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_pruned_vector_is_a_task_vector(zoos, tmp_path):
    """--save_format task_vector, then prune what came out, twice; the base is still found and verified."""
    folder = zoos["mistral"]
    prune(
        [folder / "va"],
        [tmp_path / "once"],
        "--pruning_method",
        "magnitude",
        "--sparsity_level",
        0.5,
        "--save_format",
        "task_vector",
    )
    prune([tmp_path / "once"], [tmp_path / "twice"], "--n", 1, "--m", 4)
    base, vector = load(folder / "half"), load(folder / "va")
    (once,) = expected_pruned(base, [vector], "task_vector", False, method="magnitude", sparsity_level=0.5)
    expect(tmp_path / "once", once)
    expect(tmp_path / "twice", expected_pruned(base, [once], n=1, m=4)[0])
    want = json.loads((folder / "va" / "task_vector.json").read_text())
    have = json.loads((tmp_path / "once" / "task_vector.json").read_text())
    assert have["base_model_path"] == want["base_model_path"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes(zoos, tmp_path, dtype):
    """The whole chain in bfloat16 and in float32."""
    folder = zoos["gpt2"]
    run("convert", "--model_path", folder / "base", "--save_path", tmp_path / "base", "--dtype", dtype)
    for name in "ab":
        extract(folder / name, tmp_path / "base", tmp_path / f"v{name}", "--dtype", dtype)
    run("prune", *prune_arguments(tmp_path))
    base = load(tmp_path / "base")
    vectors = [expected_vector(base, load(folder / name), getattr(torch, dtype)) for name in "ab"]
    for name, want in zip("ab", expected_pruned(base, vectors, n=1, m=4), strict=True):
        expect(tmp_path / f"p{name}", want)


@pytest.mark.slow
def test_layouts_do_not_change_a_bit(zoos, tmp_path):
    """Inputs as one file, several, one .bin and several; outputs cut anywhere: the same tensors and report."""
    folder = zoos["qwen2"]
    reports, tensors = [], []
    for i, (count, suffix, size) in enumerate(
        [(1, ".safetensors", "5GB"), (4, ".safetensors", "1KB"), (1, ".bin", "3KB"), (3, ".bin", "9KB")]
    ):
        made = tmp_path / str(i)
        for name in ("base", "a", "b"):
            config = json.loads((folder / name / "config.json").read_text())
            write(made / name, load(folder / name), config, count, suffix)
        for name in "ab":
            extract(made / name, made / "base", made / f"v{name}", "--max_shard_size", size)
        run("prune", *prune_arguments(made, "--max_shard_size", size, "--pruning_method", "random"))
        report = json.loads((made / "pa" / "prune_report.json").read_text())
        reports.append({name: (entry["hash"], entry.get("kept")) for name, entry in report["tensors"].items()})
        tensors.append({f"{n}/{k}": t for n in ("va", "pa", "pb") for k, t in load(made / n).items()})
    for other in tensors[1:]:
        assert all(oracle.same(other[name], tensors[0][name]) for name in tensors[0])
    assert all(report == reports[0] for report in reports)


# --- ties and buffers -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nm", "random in turn", "magnitude"])
def test_tied_tensors_stay_tied(zoos, tmp_path, method):
    """A head that the base spells out and the fine-tuned models lack: bit-equal to the embedding in every output."""
    folder = zoos["gpt2"]
    prune([folder / "va", folder / "vb"], [tmp_path / "pa", tmp_path / "pb"], *METHODS[method])
    for path in (folder / "half", folder / "va", tmp_path / "pa", tmp_path / "pb"):
        tensors = load(path)
        assert oracle.same(tensors["lm_head.weight"], tensors["transformer.wte.weight"])


@pytest.mark.parametrize("recorded, given", [("with", "without"), ("without", "with")])
def test_a_copy_of_the_base_with_or_without_its_tied_head(tmp_path, recorded, given):
    """Extracted from one copy and pruned onto the other: the result is that of the copy's own chain."""
    config = {"model_type": "qwen2", "tie_word_embeddings": True}
    spelled = state()
    spelled["lm_head.weight"] = spelled["model.embed_tokens.weight"].clone()
    bare = {name: tensor for name, tensor in spelled.items() if name != "lm_head.weight"}
    fine = {name: tensor for name, tensor in state(1, near=spelled).items() if name != "lm_head.weight"}
    for name, tensors in (("with", spelled), ("without", bare), ("fine", fine)):
        write(tmp_path / name, tensors, config)
    for name in ("with", "without"):
        extract(tmp_path / "fine", tmp_path / name, tmp_path / f"v_{name}")
    prune(
        [tmp_path / f"v_{recorded}"], [tmp_path / "crossed"], "--n", 1, "--m", 4, "--base_model_path", tmp_path / given
    )
    prune([tmp_path / f"v_{given}"], [tmp_path / "straight"], "--n", 1, "--m", 4)
    expect(tmp_path / "crossed", load(tmp_path / "straight"))


def test_a_head_of_its_own_is_not_dropped(tmp_path):
    """Extracted from an untied copy of the base, pruned onto a tied one without a head: refused, not left out."""
    untied = state()
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"].clone()
    tied = {name: tensor for name, tensor in untied.items() if name != "lm_head.weight"}
    for name, tensors, says in (("untied", untied, False), ("tied", tied, True)):
        write(tmp_path / name, tensors, {"model_type": "qwen2", "tie_word_embeddings": says})
        fine = {key: tensor for key, tensor in state(1, near=untied).items() if key in tensors}
        write(tmp_path / f"{name}_tuned", fine, {"model_type": "qwen2", "tie_word_embeddings": says})
        extract(tmp_path / f"{name}_tuned", tmp_path / name, tmp_path / f"v_{name}")
    alone = ["--task_vector_paths", tmp_path / "v_untied", "--save_directories", tmp_path / "1"]
    both = ["--task_vector_paths", tmp_path / "v_tied", tmp_path / "v_untied"]
    both += ["--save_directories", tmp_path / "1", tmp_path / "2"]
    for command, ties in (
        ([*alone, "--base_model_path", tmp_path / "tied"], "tied"),
        (both, "tied"),
        ([*both, "--save_format", "task_vector"], "v_tied"),
    ):
        assert refusal("prune", *command) == (
            f"tensor 'lm_head.weight' in {tmp_path}/v_untied/model.safetensors differs from "
            f"'model.embed_tokens.weight', to which {tmp_path}/{ties} ties it; prune it onto the base that it was "
            "extracted from, or leave it out with --skip 'lm_head.weight'"
        )
    run("prune", *both, "--skip", "lm_head.weight")
    assert load(tmp_path / "2").keys() == tied.keys()


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["5GB", "2KB"])
def test_vectors_of_two_dtypes_are_not_written_side_by_side(tmp_path, limit):
    """Their files would be cut apart at other tensors. As models, both have the base's dtype."""
    here = chain(tmp_path)
    extract(here / "b", here / "base", here / "wide", "--dtype", "float32")
    out, how = [here / "1", here / "2"], ["--n", 1, "--m", 4, "--max_shard_size", limit]
    both = ["--task_vector_paths", here / "va", here / "wide", "--save_directories", *out, *how]
    line = refusal("prune", *both, "--save_format", "task_vector")
    assert line == (
        f"tensor 'lm_head.weight': float16 in {here}/va and float32 in {here}/wide; extract both with the same "
        "--dtype, or prune them one by one"
    )
    assert not out[0].exists() and not out[1].exists()
    run("prune", *both)


def test_vectors_of_other_names_have_the_first_ones(tmp_path):
    """Of a copy of the base whose names have a prefix; and a base that differs behind the prefix is noticed."""
    base = state()
    for name, prefix, tensors in (("base", "", base), ("other", "module.", base), ("wrong", "module.", state(9))):
        write(tmp_path / name, {prefix + key: tensor for key, tensor in tensors.items()})
        write(tmp_path / f"{name}_tuned", {prefix + key: t for key, t in state(len(name), near=tensors).items()})
        extract(tmp_path / f"{name}_tuned", tmp_path / name, tmp_path / f"v_{name}")
    vectors = [tmp_path / "v_base", tmp_path / "v_other"]
    for save_format in ("model", "task_vector"):
        outs = [tmp_path / f"{save_format}{i}" for i in (1, 2)]
        prune(vectors, outs, "--n", 1, "--m", 4, "--save_format", save_format)
        second = {name.removeprefix("module."): tensor for name, tensor in load(vectors[1]).items()}
        want = expected_pruned(base, [load(vectors[0]), second], save_format, tied=False, n=1, m=4)
        for out, tensors in zip(outs, want, strict=True):
            expect(out, tensors)
    prune([tmp_path / "task_vector2"], [tmp_path / "again"], "--n", 4, "--m", 4, "--base_model_path", tmp_path / "base")
    line = refusal(
        "prune", "--task_vector_paths", vectors[0], tmp_path / "v_wrong", "--save_directories", *"ab", "--n", 1
    )
    assert line.endswith("were extracted from different bases; extract both from the same one")


def test_one_vector_several_times(tmp_path, capsys):
    """Random masks differ by position, so that is an ensemble; the report keeps each overlap, by number."""
    here = chain(tmp_path)
    capsys.readouterr()
    prune([here / "va", here / "vb", here / "va"], [here / n for n in "123"], "--pruning_method", "random")
    reports = [json.loads((here / n / "prune_report.json").read_text()) for n in "123"]
    labels = [f"{here}/va (1)", f"{here}/vb", f"{here}/va (3)"]
    for i, report in enumerate(reports):
        assert report["vector"] == labels[i] and report["order"] == labels
        assert list(report["totals"]["overlap"]) == labels[:i] + labels[i + 1 :]
    first, second = reports[0]["totals"]["overlap"].values()
    assert list(reports[2]["totals"]["overlap"].values())[0] == second != first
    assert f"overlap 2: with {labels[2]}" in capsys.readouterr().out


def test_buffers_are_the_bases(zoos, tmp_path):
    """inv_freq (even an infinite one), integers and booleans pass through every step unchanged."""
    for kind, names in (
        ("mistral", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.position_ids"]),
    ):
        folder = zoos[kind]
        prune([folder / "va"], [tmp_path / kind])
        for path in (folder / "half", folder / "va", tmp_path / kind):
            for name in names:
                assert oracle.same(load(path)[name], load(folder / "base")[name])


# --- merged by mergekit ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mergekit_merges_what_prune_wrote(zoos, tmp_path, kind):
    """base + sum of weight * pruned, in float64, rounded once; where no mask keeps, the base's own bits.

    Only a -0.0 of the base comes out as +0.0: mergekit adds a sum of zeros to it.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods.api import merge_state_dicts
    from mergekit.options import MergeOptions

    folder, weights = zoos[kind], (1.2, 0.9)
    prune([folder / "va", folder / "vb"], [tmp_path / "pa", tmp_path / "pb"], "--n", 1, "--m", 4)
    base, pruned = load(folder / "half"), [load(tmp_path / "pa"), load(tmp_path / "pb")]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "half"),
        "models": [
            {"model": str(tmp_path / p), "parameters": {"weight": w}}
            for p, w in zip(("pa", "pb"), weights, strict=True)
        ],
        "dtype": "float32",
        "out_dtype": "float16",
    }
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(tmp_path / "merged"), options)
    on_disk = load(tmp_path / "merged")
    in_memory = merge_state_dicts(
        [base, *pruned],
        "task_arithmetic",
        base=0,
        parameters={"weight": weights},
        dtype=torch.float32,
        out_dtype=torch.float16,
    )
    off = touched = 0
    for name in on_disk.keys() - {n for n in base if is_buffer(n, base[n])}:
        exact = base[name].double()
        for weight, tensors in zip(weights, pruned, strict=True):
            exact = exact + weight * (tensors[name].double() - base[name].double())
        want, kept = exact.half(), torch.zeros_like(base[name], dtype=torch.bool)
        for tensors in pruned:
            kept |= oracle.bits(tensors[name]) != oracle.bits(base[name])
        for merged in (on_disk[name], in_memory[name]):
            assert torch.equal(oracle.bits(merged)[~kept], oracle.bits(base[name] + 0.0)[~kept])
            steps = (merged.view(torch.int16).int() - want.view(torch.int16).int()).abs()
            assert steps.max() <= 1
            off += int((steps != 0).sum())
            touched += int(kept.sum())
    assert touched > 1000 and off <= touched / 1000  # of so few; in float16 it would be 0.3 % and more


# --- the report -----------------------------------------------------------------------------------


def test_report_figures(zoos, tmp_path):
    """Density, overlap, L2 share and evenness, recomputed from the oracle's masks for a tensor and in total."""
    folder, name = zoos["mistral"], "model.layers.0.mlp.up_proj.weight"
    prune([folder / "va", folder / "vb"], [tmp_path / "pa", tmp_path / "pb"], "--n", 200, "--m", 256)
    vectors = [load(folder / "va"), load(folder / "vb")]
    masks = np.array(oracle.masks([vector[name] for vector in vectors], name, n=200, m=256))
    report = json.loads((tmp_path / "pb" / "prune_report.json").read_text())
    entry = report["tensors"][name]
    assert (report["position"], report["pruning_method"], report["n"], report["m"]) == (2, "nm", 200, 256)
    assert entry["kept"] == masks[1].sum() and entry["numel"] == masks[1].size and entry["kind"] == "up"
    assert entry["density"] == pytest.approx(masks[1].mean(), rel=1e-5)
    overlap = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert entry["overlap"] == {str(folder / "va"): pytest.approx(overlap, rel=1e-5)}
    squares = vectors[1][name].double().flatten().numpy() ** 2
    assert entry["l2_share"] == pytest.approx(squares[masks[1]].sum() / squares.sum(), rel=1e-5)
    counts = masks[1][: masks[1].size // 256 * 256].reshape(-1, 256).sum(axis=1).astype(float)
    assert entry["evenness"] == pytest.approx(counts.sum() ** 2 / (len(counts) * (counts**2).sum()), rel=1e-5)
    parameters = [t for t in report["tensors"].values() if "kept" in t]
    assert report["totals"]["kept"] == sum(t["kept"] for t in parameters)
    assert sum(kind["numel"] for kind in report["kinds"].values()) == sum(t["numel"] for t in parameters)


@pytest.mark.slow
def test_overlap_is_zero_while_there_is_room(tmp_path):
    """Four vectors at 1:4 of tensors of whole groups share nothing; the report says 0 for every pair and 1:4
    everywhere, less where all that is left of a group is 0."""
    shapes = {name: (4 * rows, *rest) for name, (rows, *rest) in SHAPES.items()}
    base = state(0, shapes=shapes)
    write(tmp_path / "base", base)
    for seed, name in enumerate("abcd", 1):
        write(tmp_path / name, state(seed, shapes=shapes, near=base))
        extract(tmp_path / name, tmp_path / "base", tmp_path / f"v{name}")
    paths, outs = [tmp_path / f"v{name}" for name in "abcd"], [tmp_path / f"p{name}" for name in "abcd"]
    prune(paths, outs, "--n", 64, "--m", 256, "--dry_run")
    assert not any(out.exists() for out in outs)
    prune(paths, outs, "--n", 1, "--m", 4)
    for out in outs:
        tensors = json.loads((out / "prune_report.json").read_text())["tensors"]
        assert tensors.keys() == shapes.keys()
        for name, entry in tensors.items():
            assert list(entry["overlap"].values()) == [0.0] * 3, (out.name, name)
            assert 0.24 < entry["density"] <= 0.25, (out.name, name)


# --- where models come from -----------------------------------------------------------------------


def test_convert_alone_offline(tmp_path):
    """`python convert_dtype.py` as printed in the README, without a network: one line, exit 1, nothing left."""
    done = subprocess.run(
        [sys.executable, ROOT / "convert_dtype.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "error: 'mistralai/Mistral-7B-v0.1': no such directory, and as a Hugging Face Hub id: "
    )
    assert not (tmp_path / "models").exists()


class Hub:
    """A stand-in for huggingface_hub.snapshot_download: a cache of links, filled by patterns."""

    def __init__(self, remote: Path, cache: Path):
        self.remote, self.cache, self.asked = remote, cache, []

    def __call__(self, repo_id, *, allow_patterns, ignore_patterns=None, dry_run=False):
        if dry_run:  # which files are to be downloaded, for their sizes
            return []
        self.asked.append(repo_id)
        snapshot = self.cache / "snapshots" / "1"
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.remote.rglob("*"):
            name = str(path.relative_to(self.remote))
            wanted = any(fnmatch(name, p) for p in allow_patterns)
            if path.is_file() and wanted and not any(fnmatch(name, p) for p in ignore_patterns or []):
                (snapshot / name).unlink(missing_ok=True)
                (snapshot / name).symlink_to(path)
        return str(snapshot)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_hub_ids(tmp_path, monkeypatch, suffix):
    """`python convert_dtype.py` alone with a Hub: weights once, configs and tokenizer, links followed, no code."""
    import huggingface_hub

    remote = write(tmp_path / "remote", state(dtype=torch.float32), files=2, suffix=suffix)
    for name in ("tokenizer.json", "tokenizer.model", "README.md", "modeling.py", "consolidated.safetensors"):
        (remote / name).write_text("{}")
    if suffix == ".safetensors":
        (remote / "pytorch_model.bin").write_text("not wanted")
    hub = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    run("convert")
    assert set(hub.asked) == {"mistralai/Mistral-7B-v0.1"}
    got = {path.name for path in (tmp_path / "cache" / "snapshots" / "1").iterdir()}
    assert not got & {"modeling.py", "README.md", "consolidated.safetensors", "pytorch_model.bin"}
    out = tmp_path / "models" / "Mistral-7b-v0.1-float16"
    expect(out, {n: oracle.convert(t, torch.float16) for n, t in state(dtype=torch.float32).items()})
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "convert_report.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }
    assert not any(path.is_symlink() for path in out.iterdir())


def test_the_hub_answers(tmp_path, monkeypatch):
    """What the Hub says when a model is not there, in one line."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def missing(*_, **__):
        raise LocalEntryNotFoundError("nothing\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    line = refusal("convert", "--model_path", "org/name", "--save_path", tmp_path / "out")
    assert line == (
        "'org/name': no such directory, and as a Hugging Face Hub id: it is in no local cache and the Hub cannot be "
        "reached (LocalEntryNotFoundError); check the path, or the id and the network"
    )


def test_a_directory_wins_over_the_hub(tmp_path, monkeypatch):
    """org/name that is a directory is that directory."""
    write(tmp_path / "org" / "name", state(shapes=SHAPES))
    monkeypatch.chdir(tmp_path)
    run("convert", "--model_path", "org/name", "--save_path", "out")
    assert set(files(tmp_path / "out")) == {"config.json", "convert_report.json", "model.safetensors"}
