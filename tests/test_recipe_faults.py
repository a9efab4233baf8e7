"""Recipes that merged something else than they say, or ended in a traceback: each is refused, or right, now."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import CONFIG, load, state, write
from checkpoints import run as convert
from conftest import save_model
from recipes_and_models import merge_and_score
from safetensors.torch import save_file

import merge_and_evaluate_7b as script
from common.errors import DataError
from common.pruners import kernels
from common.pruners.kernels import program
from common.shards import stream
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.merging import MergeSettings, merge_identity, plan_merge
from merge_and_evaluate.recipes import read_recipe, with_weights
from merge_and_evaluate.streamed_methods import stream_reason

SHAPES = {
    "lm_head.weight": (11, 7),
    "model.embed_tokens.weight": (11, 7),
    **{f"model.layers.{i}.{part}.weight": (13, 9) for i in range(3) for part in ("mlp.up_proj", "self_attn.q_proj")},
    "model.norm.weight": (7,),
}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A working directory with base, a and b, three models of one shape in float32, all differences distinct."""
    monkeypatch.chdir(tmp_path)
    base = state(0, torch.float32, SHAPES)
    write(tmp_path / "base", base)
    for seed, name in enumerate("ab", 1):
        write(tmp_path / name, state(seed, torch.float32, SHAPES, near=base))
    return tmp_path


@pytest.fixture
def real(models, tmp_path, monkeypatch) -> Path:
    """A working directory with base, a and b, of an architecture that mergekit knows."""
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        (tmp_path / name).symlink_to(models / theirs)
    return tmp_path


def recipe(method: str, *beside: dict, base: str | None = "./base", **parameters) -> dict:
    """A recipe of ./a and ./b, with `beside` under each model's `parameters` (default: weights 0.6 and 0.5)."""
    beside = beside or ({"weight": 0.6}, {"weight": 0.5})
    listed = [{"model": f"./{name}", "parameters": own} for name, own in zip("ab", beside, strict=False)]
    config = {"merge_method": method, "base_model": base, "models": listed, "parameters": parameters}
    return {key: value for key, value in config.items() if value} | {"dtype": "float32"}


def run(config: dict | str, *flags) -> None:
    """Merge by a recipe into out/."""
    Path("r.yml").write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
    script.main(["--recipe", "r.yml", "--save_path", "out", "--merge_only", *map(str, flags)])


def merge(config: dict, *flags) -> dict[str, torch.Tensor]:
    """Merge by a recipe -> what was written."""
    run(config, *flags)
    return load(Path("out"))


def refused(config: dict | str, *flags) -> str:
    """The one line that a merge by a recipe is refused with; nothing may be left of it."""
    with pytest.raises(DataError) as error:
        run(config, *flags)
    assert not Path("out").exists() and not Path("out.part").exists()
    line = str(error.value)
    assert line and "\n" not in line
    return line


# --- the values that hold ---------------------------------------------------------------------------


def by_mergekit(method: str, name: str, models: list[dict], base: dict, **parameters) -> torch.Tensor:
    """One tensor as a merge method of mergekit merges it."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    tensors, ids = [model[name] for model in [*models, base]], [*map(str, range(len(models))), "base"]
    group = TensorGroup.from_tensors(tensors, ids=ids, base_index=len(models), name=name)
    (merged,) = registry.get(method)([group], parameters=parameters)
    return merged


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.3, (0.3, 1.0), (0.0, 0.5)])
def test_ties_rescales_as_mergekit_does(table, density):
    """To the last bit but of the norm, which mergekit sums in float32, and where a filter says so only."""
    densities = density if isinstance(density, tuple) else (density, density)
    beside = [{"weight": weight, "density": own} for weight, own in zip((0.6, 0.5), densities, strict=True)]
    rescale = [{"filter": "mlp", "value": True}, {"value": False}]
    found, models = merge(recipe("ties", *beside, rescale=rescale)), [load(table / name) for name in "ab"]
    plain, base = merge(recipe("ties", *beside), "--overwrite"), load(table / "base")
    for name in SHAPES:
        wanted = by_mergekit(
            "ties", name, models, base, weight=[0.6, 0.5], density=list(densities), rescale="mlp" in name
        )
        assert torch.allclose(found[name], wanted, rtol=1e-6, atol=1e-8), name
        assert torch.equal(found[name], plain[name]) == ("mlp" not in name), name


@pytest.mark.slow
def test_ties_rescales_alike_however_it_is_cut(table, monkeypatch):
    """Of equal magnitudes at a threshold the first are kept in every pass, those that follow the norms' included."""
    coarse = {name: torch.randint(-2, 3, shape) / 8 for name, shape in SHAPES.items()}
    write(table / "zero", {name: torch.zeros(shape) for name, shape in SHAPES.items()})
    for name, sign in (("p", 1), ("q", -1)):
        write(table / name, {key: sign * value.roll(3) for key, value in coarse.items()})
    config = recipe("ties", rescale=True, density=0.4) | {"base_model": "./zero"}
    config["models"] = [{"model": f"./{name}", "parameters": {"weight": w}} for name, w in (("p", 1.0), ("q", 0.25))]
    whole = merge(config)
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(program, "STRETCH", 32)
    monkeypatch.setattr(stream, "SHELVES", 0)  # no room for masks: they are made again
    cut = merge(config, "--overwrite")
    assert all(torch.equal(whole[name], cut[name]) for name in SHAPES)


def test_a_gradient_is_over_all_layers_of_the_model(table):
    """A layer that --skip leaves out is still one of the stack: the others are as deep as with it."""
    config = recipe("task_arithmetic", {"weight": [0, 1]}, {"weight": [1, 0]})
    whole = merge(config)
    part, base = merge(config, "--skip", "model.layers.0.*", "--overwrite"), load(table / "base")
    for name in SHAPES:
        assert torch.equal(part[name], base[name] if "layers.0." in name else whole[name]), name
    assert not torch.equal(part["model.layers.2.mlp.up_proj.weight"], base["model.layers.2.mlp.up_proj.weight"])


@pytest.fixture
def tied(table) -> Path:
    """The same models, their head tied to the embedding and stored all the same."""
    for path in (table / name for name in ("base", "a", "b")):
        tensors = load(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        shutil.rmtree(path)
        write(path, tensors, CONFIG | {"tie_word_embeddings": True})
    return table


TIED = "tensor 'lm_head.weight' is tied to 'model.embed_tokens.weight' and would be merged differently; give both the "


@pytest.mark.parametrize("method", ["linear", "ties", "random"])
def test_tied_tensors_are_not_torn_apart(tied, method):
    """Stored twice they would differ, and the config would still say that they are one."""
    base, beside = None if method == "linear" else "./base", ({"weight": 0.6}, {"weight": 0.5})
    weight = [{"filter": "lm_head", "value": 0.2}, {"value": 0.6}]
    assert TIED in refused(recipe(method, {"weight": weight}, beside[1], base=base))
    assert TIED in refused(recipe(method, *beside, base=base), "--skip", "lm_head*")
    assert TIED in refused(recipe(method, *beside, base=base), "--skip", "model.embed_tokens.weight")
    for flags in ([], ["--skip", "lm_head*", "*.embed_tokens.weight", "--overwrite"]):
        merged = merge(recipe(method, *beside, base=base), *flags)
        assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_skip_may_not_leave_out_everything(table):
    assert refused(recipe("ties"), "--skip", "*") == "r.yml: --skip leaves nothing to merge; leave out a pattern"


# --- what mergekit drops ------------------------------------------------------------------------------


def add_gate(model: Path) -> None:
    """Give a copied model a tensor that mergekit's architecture does not have."""
    tensors = load(model) | {"adapter.gate.weight": torch.ones(3).half()}
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


KEYS = [
    {"slices": None},
    {"tokenizer_source": "base"},
    {"tokenizer_source": "union"},
    {"tokenizer": {"source": "base"}},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_completeness_is_checked_with_a_tokenizer_too(models, tmp_path, monkeypatch, keys):
    """A key that cuts no layers does not switch the check off."""
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        shutil.copytree(models / theirs, tmp_path / name)
        add_gate(tmp_path / name)
    line = refused(recipe("task_arithmetic") | keys, "--engine", "mergekit")
    assert "mergekit left out 1 of" in line and "adapter.gate.weight (1)" in line


def test_another_tokenizer_may_change_rows(models, tmp_path, monkeypatch):
    """The base's embedding has more rows than its tokenizer has tokens; mergekit cuts them off."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base", 0, vocab=40)
    for theirs, name in (("wild", "a"), ("west", "b")):
        (tmp_path / name).symlink_to(models / theirs)
    merged = merge(recipe("task_arithmetic") | {"tokenizer_source": "base"})
    assert len(merged["lm_head.weight"]) == len(load(models / "wild")["lm_head.weight"]) < 40


# --- models that are named more than once -------------------------------------------------------------


@pytest.mark.parametrize("again", ["./a/", "a", "../{here}/a", "{whole}/a"])
def test_a_model_under_two_spellings_is_listed_twice(table, again):
    """mergekit refuses that; of two weights for one model the last held for both."""
    config = recipe("task_arithmetic", {"weight": 1.0}, {"weight": 0.25})
    config["models"][1]["model"] = again.format(here=table.name, whole=table)
    assert "merge_method task_arithmetic: Duplicate merge inputs" in refused(config)
    config["models"][1]["model"] = "./b"
    assert "Duplicate merge inputs" in refused(config, "--models", "a", again.format(here=table.name, whole=table))


@pytest.mark.parametrize("again", ["base/", "{whole}/base"])
def test_a_base_under_another_spelling_is_the_base(table, again):
    config = recipe("task_arithmetic", {"weight": 1.0}, {"weight": 0.25})
    without = merge(config)
    config["models"].append({"model": again.format(whole=table)})
    found = merge(config, "--overwrite")
    assert all(torch.equal(tensor, without[name]) for name, tensor in found.items())


# --- what is no recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_a_misspelled_condition_is_refused(table, shared):
    """mergekit ignores the key, so that the value held everywhere."""
    weight = [{"fliter": "mlp", "value": 0.5}, {"value": 1}]
    config = recipe("ties", {}, {}, weight=weight) if shared else recipe("ties", {"weight": weight}, {"weight": 1})
    assert "unknown key 'fliter' in a condition of weight; " in refused(config)


def test_a_base_of_slices_is_spelled_as_their_models_are(models, tmp_path, monkeypatch):
    """models/base becomes ./models/base in both places; mergekit compares text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models)
    sources = [{"model": f"models/{name}", "layer_range": [0, 2]} for name in ("base", "wild")]
    sources[1]["parameters"] = {"weight": 0.6}
    part = {"base_model": "models/base", "sources": sources}
    found = merge({"merge_method": "task_arithmetic", "slices": [part], "dtype": "float32", "out_dtype": "float16"})
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "models/base",
        "dtype": "float32",
        "out_dtype": "float16",
    }
    whole = merge(config | {"models": [{"model": "models/wild", "parameters": {"weight": 0.6}}]}, "--overwrite")
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


# --- values that no merge can use ---------------------------------------------------------------------


def test_weights_that_sum_to_zero_where_they_are_summed(table):
    """In float32; in float64 0.1 + 0.2 - 0.3 is 5.6e-17."""
    weights = {"weight": 0.1}, {"weight": 0.2}
    config = recipe("linear", *weights, base=None)
    config["models"].append({"model": "./base", "parameters": {"weight": -0.3}})
    assert "the weights sum to 0, and linear divides by that" in refused(config)


DENSITIES = [-0.2, [0.5, -0.2], [{"filter": "mlp", "value": -0.2}, {"value": 0.5}]]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_a_probability_is_not_negative(table, method, density):
    line = refused(recipe(method, {"weight": 1, "density": density}, {"weight": 1}))
    assert line.endswith("density is -0.2; it is the probability of being kept, so it must be 0 or more")


@pytest.mark.parametrize("method", ["cabs", "magnitude", "random"])
def test_our_methods_sum_in_float32(models, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        (tmp_path / name).symlink_to(models / theirs)
    config = recipe(method) | {"dtype": "float64"}
    assert refused(config) == f"r.yml: {method} sums in float32; set dtype: float32"
    assert merge(config | {"dtype": "float32", "out_dtype": "float64"})["lm_head.weight"].dtype == torch.float64


def test_what_no_engine_merges_is_not_sent_to_the_other(table):
    config = recipe("ties")
    config["models"][0]["model"] = "./a+lora"
    assert "there is no such directory; fix the path" in refused(config, "--engine", "stream")


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_density_for_each_model_through_mergekit_too(models, tmp_path, monkeypatch, method):
    """The bits of the stream, with `rescale`, whose factor is each model's own."""
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        (tmp_path / name).symlink_to(models / theirs)
    beside = {"weight": 0.6, "density": 0.5}, {"weight": 0.5, "density": 0.25}
    config = recipe(method, *beside, rescale=True, conflict_aware=True) | {"out_dtype": "float16"}
    streamed, other = merge(config), merge(config, "--engine", "mergekit", "--overwrite")
    for name, tensor in streamed.items():
        assert torch.equal(tensor.view(torch.int16), other[name].view(torch.int16)), name


@pytest.mark.parametrize("count", [17, 18])
def test_many_differences_are_summed_as_mergekit_does(count):
    """Streamed while torch adds them in their order."""
    stack = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    in_order = sum(stack, torch.zeros(64))
    models = [{"model": f"m{i}", "parameters": {"weight": 1}} for i in range(count)]
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": [*models, {"model": "base"}]}
    assert torch.equal(stack.sum(0), in_order) == (stream_reason(config) is None) == (count == 17)


# --- sweeps -----------------------------------------------------------------------------------------------


def swept(config: dict, *weights: float) -> dict:
    """The config of a recipe with weights set."""
    Path("r.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    return with_weights(read_recipe("r.yml"), weights).config


def test_a_sweep_sets_the_weight_of_every_model(table):
    """Not only of those that have one of their own, beside others that share one."""
    with pytest.raises(DataError, match="some models have a `weight` of their own and others share one; a sweep needs"):
        swept(recipe("task_arithmetic", {"weight": 1}, {}, weight=0.5), 0.9)
    assert swept(recipe("task_arithmetic", {}, {}, weight=0.5), 0.9)["parameters"] == {"weight": 0.9}
    found = swept(recipe("task_arithmetic", {"weight": 1}, {"weight": 2}, weight=0.5), 0.9, 0.8)["models"]
    assert [model["parameters"]["weight"] for model in found] == [0.9, 0.8]


def test_what_to_do_about_normalised_weights(table):
    """linear has no lambda to set; a quoted "false" is false to mergekit."""
    with pytest.raises(DataError, match="equal weights cancel; set `normalize: false` under `parameters`"):
        swept(recipe("linear", base=None), 0.9)
    with pytest.raises(DataError, match="set `normalize: false`, or a `lambda` for the sweep, under `parameters`"):
        swept(recipe("ties"), 0.9)
    found = swept(recipe("ties", normalize="false"), 0.9)["models"]
    assert [model["parameters"]["weight"] for model in found] == [0.9, 0.9]


def test_no_two_weights_share_a_name(table):
    """Of a directory, a results file, a row; usual weights keep the short names they have."""
    choices = [Choice((weight,)) for weight in (0.6, 0.6000001, 1.0, 1e-9, 1.2000000000000002)]
    assert [choice.label for choice in choices] == ["0.6", "0.6000001", "1", "1e-09", "1.2000000000000002"]
    assert [choice.ending for choice in choices] == [f"weight_{choice.label}" for choice in choices]


# --- "holds this merge already" -------------------------------------------------------------------------


def replace_weights(model: Path) -> None:
    """Other weights in a directory whose records, written with the old ones, stay."""
    (path,) = model.glob("*.safetensors")
    tensors = load(model)
    time.sleep(0.01)
    save_file({name: value * 2 for name, value in tensors.items()}, path, metadata={"format": "pt"})


@pytest.fixture
def converted(models, tmp_path, monkeypatch) -> Path:
    """A working directory with base, a and b, converted by the first script, which records their hashes."""
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        convert("convert", "--model_path", models / theirs, "--save_path", name, "--dtype", "float16")
    return tmp_path


def test_weights_that_were_replaced_make_another_merge(converted):
    """mergekit does not check what was recorded; a streamed merge does, once it reads: not if it thinks it is done."""
    config = recipe("task_arithmetic")
    run(config, "--engine", "mergekit")
    run(config, "--engine", "mergekit")  # the same: nothing to do
    replace_weights(converted / "a")
    with pytest.raises(DataError, match="already there; give --overwrite"):
        run(config, "--engine", "mergekit")
    run(config, "--engine", "mergekit", "--overwrite")
    with pytest.raises(DataError, match="not the bytes that were recorded when it was written"):
        run(config, "--overwrite")


def test_weights_that_were_replaced_are_noticed_by_a_finished_stream(converted):
    config = recipe("task_arithmetic")
    run(config)
    replace_weights(converted / "b")
    with pytest.raises(DataError, match="already there; give --overwrite"):
        run(config)


def test_models_that_were_written_again_with_the_same_bytes_are_the_same(converted, models, capsys):
    config = recipe("task_arithmetic")
    run(config)
    convert("convert", "--model_path", models / "west", "--save_path", "b", "--dtype", "float16", "--overwrite")
    capsys.readouterr()
    run(config)
    assert "out holds this merge already" in capsys.readouterr().out


def test_a_merge_is_the_same_however_its_models_are_spelled(table, capsys):
    config = recipe("task_arithmetic")
    run(config)
    for spelling in ("{}/", "../{here}/{}", "{whole}/{}"):
        places = {name: spelling.format(name, here=table.name, whole=table) for name in ("base", "a", "b")}
        config["base_model"] = places["base"]
        for model, name in zip(config["models"], "ab", strict=True):
            model["model"] = places[name]
        run(config)
        assert "out holds this merge already" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "draws"), [("random", False), ("ties", False), ("dare_ties", True)])
def test_a_seed_that_is_not_used_makes_no_other_merge(table, method, draws):
    """`random` has a seed of its own in the recipe: that of a race changes nothing, and another is refused."""
    beside = {"weight": 0.6, "density": 0.5}
    config = recipe(method, beside, beside)
    if not draws:
        line = refused(config, "--seed", "1")
        assert line.startswith(f"--seed: nothing is drawn by it ({method})") and line.endswith("; leave --seed out")
        assert ("`seed` under its recipe's `parameters`" in line) == (method == "random")
    run(config)
    assert ("seed" in json.loads(Path("out/merge_report.json").read_text())) == draws
    if draws:
        with pytest.raises(DataError, match="already there; give --overwrite"):
            run(config, "--seed", "1")
    read = read_recipe("r.yml")
    one, other = (merge_identity(read, {}, MergeSettings(seed=seed)) for seed in (0, 1))
    assert (one == other) == (not draws)
    each = [MergeSettings(seed=seed) for seed in (0, 1)]
    one, other = (plan_merge(read, "new", settings).streamed(settings).job.identity for settings in each)
    assert (one == other) == (not draws), "a merge that was stopped resumes by any seed that it does not use"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "draws"), [("della", True), ("della_linear", True), ("dare_ties", True), ("breadcrumbs", False)]
)
def test_what_mergekit_draws_by_the_seed(real, method, draws):
    """To the bits: what is said to draw nothing gives the same ones by any seed."""
    beside = {"weight": 0.6, "density": 0.5}
    config = recipe(method, beside, beside)
    if not draws:
        assert "nothing is drawn by it" in refused(config, "--engine", "mergekit", "--seed", "1")
        return
    found = merge(config, "--engine", "mergekit")
    other = merge(config, "--engine", "mergekit", "--seed", "1", "--overwrite")
    assert any(not torch.equal(found[name], tensor) for name, tensor in other.items())
    assert json.loads(Path("out/merge_report.json").read_text())["seed"] == 1


@pytest.mark.parametrize("engine", ["stream", "mergekit"])
@pytest.mark.parametrize("size", ["5GB", "2KB"])
def test_a_directory_without_its_weights_is_not_the_merge(real, engine, size):
    """Deleted to free the disk: the report beside them stays, and the index of several files."""
    config, flags = recipe("task_arithmetic"), ("--engine", engine, "--max_shard_size", size)
    merged = merge(config, *flags)
    for path in sorted(Path("out").glob("*.safetensors"))[-1:]:
        path.unlink()
    with pytest.raises(DataError, match="out: already there; give --overwrite"):
        run(config, *flags)
    again = merge(config, *flags, "--overwrite")
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


@pytest.mark.slow
def test_a_finished_sweep_restores_weights_that_were_deleted(here, capsys):
    weights = ("--weights", "0.5", "1")
    merge_and_score(*weights)
    merged = load(here / "merged")
    (here / "merged" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="merged: already there; give --overwrite"):
        merge_and_score(*weights)
    capsys.readouterr()
    merge_and_score(*weights, "--overwrite")
    assert capsys.readouterr().out.endswith("results.json is from before\nwrote merged\n")
    again = load(here / "merged")
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


# --- what ended in a traceback ----------------------------------------------------------------------------


def without_models(method: str) -> dict:
    config = recipe(method)
    return config | {"models": [{"model": "./base", "parameters": {"weight": 1}}]}


def sliced(**source) -> dict:
    sources = [{"model": "./a", **source}] if source else []
    return {"merge_method": "passthrough", "slices": [{"sources": sources}], "dtype": "float32"}


NO_RECIPES = [
    (without_models("task_arithmetic"), "r.yml: names no model besides the base, ./base; add those to be merged"),
    (without_models("ties"), "r.yml: names no model besides the base, ./base; "),
    (recipe("cabs", n="64", m=32), "r.yml: model ./a: n is 64 and m is 32; cabs keeps n of every m"),
    (recipe("ties") | {"merge_method": ["ties"]}, "r.yml: merge_method: Input should be a valid string; fix the"),
    (recipe("ties") | {"base_model": 7}, "r.yml: base_model"),
    (sliced(), "r.yml: slices: `sources` is empty; name a model there and a layer_range"),
    ("date: 2024-13-45", "r.yml: no valid YAML (month must be in 1..12); fix the recipe"),
]


@pytest.mark.parametrize(("config", "line"), NO_RECIPES, ids=[line[:60] for _, line in NO_RECIPES])
def test_a_line_says_what_is_wrong(table, config, line):
    assert refused(config).startswith(line)


def test_numbers_as_text_are_numbers(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for theirs, name in (("base", "base"), ("wild", "a"), ("west", "b")):
        (tmp_path / name).symlink_to(models / theirs)
    found, same = (merge(recipe("cabs", n=n, m=16), "--overwrite") for n in ("4", 4))
    assert all(torch.equal(found[name], same[name]) for name in found)
    merged = merge(sliced(layer_range=["0", "2"]), "--overwrite")
    assert merged.keys() == load(models / "wild").keys()


def test_n_and_m_are_compared_tensor_by_tensor(table):
    """The largest n of all filters may be another tensor's than the smallest m."""
    n, m = ([{"filter": "mlp", "value": of_mlp}, {"value": other}] for of_mlp, other in ((16, 5), (32, 4)))
    line = "tensor 'lm_head.weight': model ./a: n is 5 and m is 4; cabs keeps n"
    assert line in refused(recipe("cabs", n=n, m=m))
    n[1]["value"] = 1
    assert merge(recipe("cabs", n=n, m=m)).keys() == SHAPES.keys()


# --- anchors ------------------------------------------------------------------------------------------------

ANCHORED = """
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./a
    parameters: &same {weight: 1.0}
  - model: ./b
    parameters: *same
dtype: float32
"""


def test_weights_that_share_an_anchor_are_set_one_by_one(table):
    """One mapping in two places took the last weight for both."""
    Path("r.yml").write_text(ANCHORED)
    found = with_weights(read_recipe("r.yml"), (0.5, 2.0))
    assert [model["parameters"]["weight"] for model in found.config["models"]] == [0.5, 2.0]
    assert yaml.safe_load(found.text) == found.config


@pytest.mark.parametrize("levels", [1, 40])
def test_aliases_without_an_end_are_refused(table, levels):
    """Of themselves, or of ten each time: a file of some lines, and no memory would hold what it means."""
    lines = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, levels)]
    assert "no valid YAML" in refused("\n".join(["x0: &x0 [*x0]" if levels == 1 else "x0: &x0 [1]", *lines]))


# --- mergekit's longer form of a model ----------------------------------------------------------------------


LONGER = [{"model": {"path": "./a"}}, {"model": "a"}, {"model": {"path": "./a", "revision": None}, "lora": None}]


@pytest.mark.parametrize("model", LONGER, ids=str)
def test_flags_replace_paths_in_the_longer_form(real, model):
    config = recipe("task_arithmetic", {"weight": 0.6}) | {"base_model": {"model": {"path": "./b"}}}
    config["models"][0]["model"] = model
    found = merge(config, "--models", "./b", "--base_model", "./base")
    wanted = recipe("task_arithmetic", {"weight": 0.6})
    wanted["models"][0]["model"] = "./b"
    wanted = merge(wanted, "--engine", "mergekit", "--overwrite")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


MORE = [
    ({"model": {"path": "./a"}, "lora": {"path": "./b"}}, "asks for a LoRA, ./b; "),
    ({"model": "./a", "lora": "./b"}, "asks for a LoRA, ./b; "),
    ({"model": {"path": "./a", "revision": "v1"}}, "asks for a revision, v1; "),
    ({"model": {"path": "./a"}, "laro": "./b"}, "unknown key 'laro' in a model; known: model, lora, override_arch"),
    ({"model": {"path": "./a", "version": 1}}, "unknown key 'version' in the path of a model; known: path, revision"),
]


@pytest.mark.parametrize(("model", "line"), MORE, ids=[line[:30] for _, line in MORE])
def test_what_of_the_longer_form_is_not_merged_is_refused(real, model, line):
    """A LoRA ended in "Need to specify cache dir"; of a revision the headers of another one were checked."""
    config = recipe("task_arithmetic")
    config["models"][0]["model"] = model
    assert line in refused(config)
    assert line in refused(recipe("task_arithmetic") | {"base_model": model})


PLACES = ["c++", "a+b", "v@2", "x@y+z@1"]


@pytest.mark.parametrize("engine", ["stream", "mergekit"])
@pytest.mark.parametrize("place", PLACES)
def test_a_directory_may_have_any_name(real, place, engine):
    """What mergekit would take for a LoRA or a revision, or could not parse; with a filter beside a model as well."""
    beside = {"weight": [{"filter": "mlp", "value": 0.2}, {"value": 0.6}]}, {"weight": 0.5}
    wanted = merge(recipe("task_arithmetic", *beside), "--engine", engine)
    (real / place).mkdir()
    config = recipe("task_arithmetic", *beside) | {"base_model": f"./{place}/base"}
    for model, name in zip(["base", *config["models"]], ("base", "a", "b"), strict=True):
        shutil.copytree(real / name, real / place / name)
        if name != "base":
            model["model"] = f"{real}/{place}/{name}"
    found = merge(config, "--engine", engine, "--overwrite")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("method", ["linear", "cabs"])
def test_a_plus_in_a_path_of_other_methods(table, method):
    (table / "c++").symlink_to(".")
    config = recipe(method, base=None if method == "linear" else "./base")
    wanted = merge(config)
    flags = ["--models", "c++/a", "c++/b", *([] if method == "linear" else ["--base_model", "c++/base"])]
    found = merge(config, *flags, "--overwrite")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# --- more models than torch adds in their order -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [17, 18])
def test_ties_of_many_models_is_mergekits(table, count):
    """The election sums the differences, too: beyond 17 the stream's sum is not torch's."""
    base, models = load(table / "base"), []
    for i in range(count):
        models.append(state(i + 3, torch.float32, SHAPES, near=base))
        write(table / f"m{i}", models[-1])
    config = recipe("ties", density=0.5, weight=0.7)
    config["models"] = [{"model": f"./m{i}"} for i in range(count)]
    assert (stream_reason(config) is None) == (count == 17)
    if count == 18:
        assert "models: more than 17 differences are summed" in refused(config, "--engine", "stream")
        return
    found = merge(config)
    values = {"weight": [0.7] * count, "density": [0.5] * count}
    for name in SHAPES:
        wanted = by_mergekit("ties", name, models, base, **values)
        assert torch.equal(found[name], wanted), name


# --- which weights cancel -----------------------------------------------------------------------------------


def test_a_listed_base_keeps_its_weight(table):
    """linear from base to tuned model, as WiSE-FT: of 1 and λ, λ is swept."""
    config = recipe("linear", {"weight": 0.5}, base="./base")
    config["models"].insert(0, {"model": "base", "parameters": {"weight": 1.0}})
    assert [model["parameters"]["weight"] for model in swept(config, 3.0)["models"]] == [1.0, 3.0]
    base, a = load(table / "base"), load(table / "a")
    merged = merge(swept(config, 3.0))
    assert all(torch.allclose(merged[name], (base[name] + 3 * a[name]) / 4, atol=1e-6) for name in base)
    shared = recipe("linear", {}, {}, base="./base", weight=0.5)
    shared["models"].append({"model": "./base", "parameters": {"weight": [1.0, 0.5]}})
    assert swept(shared, 3.0)["parameters"] == {"weight": 3.0}


@pytest.mark.parametrize(("base", "shared"), [({"weight": 0}, {}), ({}, {"weight": 0.5}), (None, {"weight": 0.5})])
def test_a_base_without_a_weight_of_its_own_keeps_none(table, base, shared):
    beside = [{}, {}] if shared else [{"weight": 0.6}, {"weight": 0.5}]
    config = recipe("linear", *beside, base="./base", **shared)
    config["models"] += [] if base is None else [{"model": "./base", "parameters": base}]
    with pytest.raises(DataError, match="equal weights cancel"):
        swept(config, 0.9)


def test_methods_that_normalise_under_another_name(table):
    """Two weights, the same for both models, were two names for one merge."""
    with pytest.raises(
        DataError, match="nuslerp divides .* so equal weights cancel; give --weight_grid for each model"
    ):
        swept(recipe("nuslerp"), 0.25)
    with pytest.raises(DataError, match="equal weights cancel; set `normalize_weights: false` under `parameters`"):
        swept(recipe("multislerp"), 0.25)
    assert swept(recipe("multislerp", normalize_weights=False), 0.25)["models"][1]["parameters"] == {"weight": 0.25}
    assert swept(recipe("nuslerp"), 0.25, 1.0)["models"][1]["parameters"] == {"weight": 1.0}
