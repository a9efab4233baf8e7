"""Candidates in memory: the weights that are scored are, bit for bit, those that writing and loading would give."""

import json
import shutil

import numpy as np
import pytest
from conftest import DEVICES, first_quick, save_model
from long_tasks import whole_document
from recipes_and_models import RECIPE, left_over, merge, merge_and_score, write_yaml

from common.errors import DataError
from common.shards.hashing import file_hash
from common.shards.memory import MemorySink
from merge_and_evaluate import in_memory, scoring
from merge_and_evaluate.eval_recipes import read_eval_recipe
from merge_and_evaluate.in_memory import fill, fillable, loaded_model, written_reason
from merge_and_evaluate.merging import MergeSettings, plan_merge
from merge_and_evaluate.recipes import read_recipe, with_weights

SETTINGS = MergeSettings()


def written_state(directory: str, dtype: str) -> dict:
    """The weights of a written model as transformers loads them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()


def equal_bits(left: dict, right: dict) -> bool:
    """Whether two state dicts hold the same names, dtypes and bits."""
    same = left.keys() == right.keys() and all(left[name].dtype == right[name].dtype for name in left)
    return same and all(
        bytes(left[n].view(-1).numpy().view("u1")) == bytes(right[n].view(-1).numpy().view("u1")) for n in left
    )


def as_integers(state: dict) -> dict:
    """On the CPU; bfloat16, which numpy does not have, as 16-bit integers, the rest as it is."""
    import torch

    on_cpu = {n: t.cpu() for n, t in state.items()}
    return {n: t.view(torch.int16) if t.dtype == torch.bfloat16 else t for n, t in on_cpu.items()}


def tied_models(folder) -> None:
    """base, wild and west whose head is the embedding: their files hold no lm_head.weight."""
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate(("base", "wild", "west")):
        (folder / name).unlink()
        save_model(folder / name, 2 * seed)  # even seeds are saved as one file
        config = json.loads((folder / name / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / name / "config.json").write_text(json.dumps(config))
        file = folder / name / "model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file, {"format": "pt"})


# --- bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", first_quick("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("scored_in", first_quick("auto", "float32", "bfloat16"))
@pytest.mark.parametrize("method", first_quick("task_arithmetic", "cabs"))
def test_what_is_scored_is_what_is_written(here, device, dtype, scored_in, method):
    """Filled, filled with another weight, filled again: the same bits as the written model in the dtype it is scored
    in."""
    write_yaml(here / "recipe.yml", {**RECIPE, "merge_method": method, "out_dtype": dtype})
    merge()
    args = "" if scored_in == "auto" else f"dtype={scored_in}"
    recipe = read_eval_recipe("eval.yml", device=device, model_args=args or None)
    plan = plan_merge(read_recipe("recipe.yml"), "elsewhere", SETTINGS)
    before = {path.name: file_hash(path) for path in (here / "base").glob("*.safetensors")}
    with loaded_model(recipe, plan, SETTINGS) as (loaded, reason):
        assert reason is None
        other = plan_merge(with_weights(plan.recipe, (0.3,)), "elsewhere", SETTINGS)
        for each in (plan, other, plan):
            fill(loaded, each, SETTINGS, "merge")
        assert loaded.lm.model.device.type == device
        state = as_integers(loaded.lm.model.state_dict())
        # lm-eval scores a float16 model in float32 on a CPU, which holds every one of its values
        on_its_own = "float32" if (device, dtype) == ("cpu", "float16") else dtype
        expected = on_its_own if scored_in == "auto" else scored_in
        assert equal_bits(state, as_integers(written_state("merged", expected)))
    assert before == {path.name: file_hash(path) for path in (here / "base").glob("*.safetensors")}
    assert left_over(here) == {"merged"}


@pytest.mark.slow
def test_a_tied_head_is_filled_once(here):
    tied_models(here)
    merge()
    plan = plan_merge(read_recipe("recipe.yml"), "elsewhere", SETTINGS)
    with loaded_model(read_eval_recipe("eval.yml", device="cpu"), plan, SETTINGS) as (loaded, reason):
        assert reason is None and "lm_head.weight" not in loaded.tensors
        fill(loaded, plan, SETTINGS, "merge")
        state = loaded.lm.model.state_dict()
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        assert equal_bits(as_integers(state), as_integers(written_state("merged", "float32")))


@pytest.mark.slow
def test_config_and_tokenizer_are_the_merged_models_own(here):
    merge()
    plan = plan_merge(read_recipe("recipe.yml"), "elsewhere", SETTINGS)
    with loaded_model(read_eval_recipe("eval.yml", device="cpu"), plan, SETTINGS) as (loaded, _):
        names = {path.name for path in loaded.directory.iterdir() if not path.is_symlink()}
        assert names == {p.name for p in (here / "merged").iterdir()} - {
            "merge_report.json",
            "README.md",
            "model.safetensors",
        }
        for name in names:
            assert (loaded.directory / name).read_bytes() == (here / "merged" / name).read_bytes()
        place = loaded.directory
    assert not place.exists()


def test_the_sink_rounds_as_loading_does():
    """float32 elements in blocks of 3 into a bfloat16 tensor: torch's rounding; into float16 likewise."""
    from types import SimpleNamespace

    import torch

    values = np.random.default_rng(0).standard_normal(11).astype(np.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        target, moved = torch.full((11,), 9.0, dtype=dtype), []
        task = SimpleNamespace(name="x", slots=(SimpleNamespace(dtype="F32"),))
        (writer,) = MemorySink({"x": target}).writers(task, [], moved.append)
        for start in range(0, 11, 3):
            writer.room(start, min(start + 3, 11))[:] = values[start : start + 3].view(np.uint32)
        writer.flush()
        assert torch.equal(target, torch.from_numpy(values).to(dtype)) and sum(moved) == 44


# --- where it cannot be ---------------------------------------------------------------------------


def test_why_candidates_are_written(here):
    plan = plan_merge(read_recipe("recipe.yml"), "merged", SETTINGS)
    plain = read_eval_recipe("eval.yml")
    assert written_reason(plain, plan, SETTINGS) is None
    peft = read_eval_recipe("eval.yml", model_args="peft=x,dtype=float32")
    assert written_reason(peft, plan, SETTINGS) == "model_args: peft may change what is loaded"
    dummy = read_eval_recipe("eval.yml")
    dummy.config["model"] = "dummy"
    assert written_reason(dummy, plan, SETTINGS) == "model: dummy loads its models itself"
    mergekit = plan_merge(read_recipe("recipe.yml"), "merged", MergeSettings(engine="mergekit"))
    assert written_reason(plain, mergekit, SETTINGS) == "mergekit merges: --engine mergekit"


def test_names_that_do_not_map_are_not_filled(here):
    """A parameter of the model that the checkpoint lacks, one that it alone has, another shape, two names for one
    storage."""
    import torch

    merge_ = plan_merge(read_recipe("recipe.yml"), "merged", SETTINGS).streamed(SETTINGS)
    shapes = {slot.name: slot.shape for shard in merge_.job.outputs[0].shards for slot in shard.slots}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert fillable(state, state, merge_)[1] is None
    first, second = list(shapes)[:2]
    for changed, parameters, reason in [
        ({n: t for n, t in state.items() if n != first}, state, f"the loaded model has no tensor {first!r}"),
        (
            state,
            state | {"v.weight": torch.zeros(2)},
            "the loaded model's parameter 'v.weight' is not in the checkpoint",
        ),
        (state | {first: torch.zeros(3)}, {}, f"tensor {first!r} is loaded as torch.float32 [3]"),
        (
            state | {first: torch.zeros(shapes[first], dtype=torch.int8)},
            {},
            f"tensor {first!r} is loaded as torch.int8",
        ),
        (state | {first: torch.zeros(shapes[first], device="meta")}, {}, f"tensor {first!r} does not fit into memory"),
    ]:
        assert fillable(changed, parameters, merge_)[1].startswith(reason)
    same = next(name for name in shapes if name != first and shapes[name] == shapes[first])
    assert fillable(state | {same: state[first]}, {}, merge_)[1] == "it stores tied tensors twice"


# --- whole sweeps ---------------------------------------------------------------------------------


def scores_of(path) -> dict:
    return {task: found["value"] for task, found in json.loads(path.read_text())["summary"]["tasks"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_in_memory_is_the_sweep_on_disk(here, device, capsys):
    """The same scores, items and winner as with a directory each, through lm-eval itself; nothing but the winner is
    written."""
    flags = ["--weights", "0.3", "0.9", "--choose_on", "colours", "--device", device]
    merge_and_score(*flags)
    assert in_memory.IN_MEMORY in capsys.readouterr().out
    names = ("results_weight_0.3.json", "results_weight_0.9.json", "results.json")
    assert left_over(here) == {"merged", "results_sweep.csv", "results_sweep.png", *names}
    found = {name: json.loads((here / name).read_text()) for name in names}
    shutil.rmtree(here / "merged")
    for name in names:
        (here / name).unlink()
    merge_and_score(*flags, "--keep_models", "--overwrite")
    for name in names:
        again = json.loads((here / name).read_text())
        for key in ("results", "items"):
            assert again[key] == found[name][key]
        assert again["config"]["model"] == found[name]["config"]["model"] == "hf"
        assert again["config"]["model_dtype"] == found[name]["config"]["model_dtype"]
        assert again["provenance"]["identity"] == found[name]["provenance"]["identity"]


@pytest.mark.slow
def test_one_model_is_loaded_and_dropped_before_the_winner_is_scored(here, monkeypatch):
    """Peak memory is one model: when the written winner is loaded, nothing holds the one that was filled."""
    import gc
    import weakref

    loaded, alive = [], []

    def stand_in(recipe, model, tasks, identity, filled):
        if filled:
            loaded.append(weakref.ref(filled.lm))
        else:
            gc.collect()
            alive.append(loaded[-1]() is not None)
        return whole_document(recipe, model, tasks, identity)

    monkeypatch.setattr(scoring, "evaluate", stand_in)
    merge_and_score("--weights", "0.3", "0.9", "--choose_on", "colours")
    assert len(loaded) == 2 and loaded[0]() is loaded[1]() is None and alive == [False]


def test_a_merge_that_overflows_in_memory_is_refused_by_name(here):
    with pytest.raises(DataError, match="a sum is beyond the largest float16; lower the weights"):
        merge_and_score("--weights", "1e9", "1e8")
    assert left_over(here) == set()
