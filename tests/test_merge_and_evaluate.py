"""merge_and_evaluate_7b.py on tiny real models: what it writes, and what it refuses before writing anything."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from checkpoints import load
from conftest import ROOT, save_model
from recipes_and_models import EVAL, RECIPE, left_over, merge, merge_and_score, score, write_yaml

import merge_and_evaluate_7b as script
from common.errors import DataError
from merge_and_evaluate.results import read_results
from merge_and_evaluate.scores import mean_stderr, summarize

# --- merge and evaluate ---------------------------------------------------------------------------


def test_merges_scores_and_says_so(here, capsys):
    """The whole of step 4: the model is the exact sum, the document lm-eval's, the summary computed from it."""
    merge_and_score("--name", "TA")
    printed = capsys.readouterr().out
    merged, base, wild, west = (load(here / name) for name in ("merged", "base", "wild", "west"))
    for name in base:
        tensors = [x[name].double().numpy() for x in (base, wild, west)]
        exact = tensors[0] + 1.2 * (tensors[1] - tensors[0]) + 0.7 * (tensors[2] - tensors[0])
        steps = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
        assert (np.abs(merged[name].numpy() - exact) <= 0.502 * steps).all(), name  # rounded once, from float32

    document = json.loads((here / "results.json").read_text())
    from lm_eval.utils import make_table

    assert "colours" in make_table(document) and make_table(document) in printed
    summary = document["summary"]
    assert summary["name"] == "TA" and list(summary["tasks"]) == ["colours", "shades"]
    values = [document["results"][task]["acc,none"] for task in summary["tasks"]]
    assert [task["value"] for task in summary["tasks"].values()] == values
    assert summary["average"] == sum(values) / 2
    assert summary["tasks"]["colours"]["num_fewshot"] == 0 and summary["tasks"]["colours"]["samples"] == 6
    origin = document["provenance"]
    assert origin["recipe"] == (here / "recipe.yml").read_text() and origin["batch_size"] == 4
    assert origin["model"] == "merged" and origin["versions"]["lm_eval"] == "0.4.13"
    assert set(origin["models"]) == {"./base", "./wild", "./west"}
    assert left_over(here) == {"merged", "results.json"}


def test_merged_directory_is_whole(here):
    """transformers loads it, dtype and tokenizer included, and merge_report.json has every tensor's hash."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.shards.hashing import tensor_hashes
    from common.shards.headers import read_headers

    merge("--max_shard_size", "20KB")
    assert (here / "merged" / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained("merged")
    assert str(model.dtype) == "torch.float16"
    assert AutoTokenizer.from_pretrained("merged")("the sky").input_ids == [3, 8]
    hashes = json.loads((here / "merged" / "merge_report.json").read_text())["tensors"]
    assert hashes == tensor_hashes(read_headers(here / "merged"), "read back")
    assert "\n# merged\n" in (here / "merged" / "README.md").read_text()
    modes = {path.stat().st_mode & 0o777 for path in (here / "merged").iterdir()}
    assert modes == {0o644}


def test_a_relative_path_with_one_slash_works_offline(here):
    """`models/x` makes mergekit's card ask the Hub; the recipe gets ./models/x instead."""
    (here / "models").mkdir()
    for name in ("base", "wild", "west"):
        (here / "models" / name).symlink_to((here / name).resolve())
    write_yaml(here / "recipe.yml", yaml.safe_load(yaml.safe_dump(RECIPE).replace("./", "models/")))
    merge("--engine", "mergekit")
    assert (here / "merged" / "tokenizer.json").is_file()


def test_a_hub_id_is_merged_from_its_download(here, monkeypatch):
    """mergekit gets the snapshot's directory, so that a cached model merges offline."""
    import common.shards.checkpoint

    local = common.shards.checkpoint.local_directory
    monkeypatch.setattr(
        common.shards.checkpoint, "local_directory", lambda path: local("west" if path == "org/west" else path)
    )
    models = [RECIPE["models"][0], {"model": "org/west", "parameters": {"weight": 0.7}}]
    write_yaml(here / "recipe.yml", {**RECIPE, "models": models})
    merge("--engine", "mergekit")
    report = json.loads((here / "merged" / "merge_report.json").read_text())
    assert list(report["models"]) == ["./base", "./wild", "org/west"]


@pytest.mark.slow
def test_the_same_command_goes_on_after_the_merge(here, capsys):
    """A run that was stopped before scoring does not merge again; another recipe's model is not taken for it."""
    merge()
    before = (here / "merged" / "model.safetensors").stat().st_mtime_ns
    merge_and_score()
    assert "holds this merge already" in capsys.readouterr().out
    assert (here / "merged" / "model.safetensors").stat().st_mtime_ns == before
    other = {**RECIPE, "models": RECIPE["models"][:1]}
    write_yaml(here / "recipe.yml", other)
    with pytest.raises(DataError, match="already there; give --overwrite"):
        merge_and_score("--output_path", "other.json")
    merge("--overwrite")
    assert (here / "merged" / "model.safetensors").stat().st_mtime_ns != before


@pytest.mark.slow
def test_eval_only_scores_any_model(here):
    score("west", "--output_path", "deep/west.json")
    document = json.loads((here / "deep" / "west.json").read_text())
    assert document["summary"]["name"] == "west" and document["config"]["model_args"]["pretrained"] == "west"
    assert "recipe" not in document["provenance"]


@pytest.mark.slow
def test_eval_recipe_is_the_file_lm_eval_takes(here):
    """Flags win over the file; limit, shots, samples and patterns are lm-eval's."""
    write_yaml(
        here / "eval.yml",
        {
            **EVAL,
            "tasks": "col*,shades",
            "limit": 3,
            "num_fewshot": 0,
            "log_samples": True,
            "model_args": "dtype=float32",
            "seed": 7,
        },
    )
    score("west", "--batch_size", "2")
    document = json.loads((here / "results.json").read_text())
    assert document["config"]["batch_size"] == 2 and document["config"]["model_dtype"] == "torch.float32"
    assert document["summary"]["tasks"]["colours"]["samples"] == 3
    assert len((here / "results_samples_colours.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_response_cache_is_apart_for_every_model(here):
    """lm-eval keys it by request alone: with one cache the second model would get the first one's answers."""
    write_yaml(here / "eval.yml", {**EVAL, "use_cache": "cache"})
    for name in ("base", "west"):
        score(name, "--output_path", f"{name}.json")
    assert len(list(here.glob("cache_*.db"))) == 2


def test_dry_run_writes_nothing(here, capsys):
    merge_and_score("--dry_run")
    printed = capsys.readouterr().out
    assert "GB  ./wild" in printed and "GB  merged" in printed and "colours, shades" in printed
    assert left_over(here) == set()


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'mergekit', 'lm_eval', 'matplotlib'}"
    code = f"import sys, merge_and_evaluate_7b; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- summary --------------------------------------------------------------------------------------


def document(**results) -> dict:
    counts = {name: {"effective": scores.pop("n", 100), "original": 100} for name, scores in results.items()}
    return {"results": results, "group_subtasks": {}, "n-shot": {}, "n-samples": counts, "higher_is_better": {}}


def test_summary_takes_the_leaderboards_metrics():
    scores = {"acc,none": 0.1, "acc_stderr,none": 0.01, "acc_norm,none": 0.2, "acc_norm_stderr,none": 0.02}
    gsm8k = {
        "exact_match,strict-match": 0.3,
        "exact_match_stderr,strict-match": 0.03,
        "exact_match,flexible-extract": 0.9,
    }
    tasks = summarize(document(arc_challenge=scores, winogrande=dict(scores), gsm8k=gsm8k))["tasks"]
    assert [(task["metric"], task["value"], task["stderr"]) for task in tasks.values()] == [
        ("acc_norm,none", 0.2, 0.02),
        ("acc,none", 0.1, 0.01),
        ("exact_match,strict-match", 0.3, 0.03),
    ]


def test_mmlu_is_the_plain_mean_and_the_weighted_one():
    """Two subjects of 100 and 300 questions: 0.2 and 0.6 make 0.4 plainly and 0.5 by size."""
    made = document(
        mmlu_a={"acc,none": 0.2, "acc_stderr,none": 0.03, "n": 100},
        mmlu_b={"acc,none": 0.6, "acc_stderr,none": 0.04, "n": 300},
        mmlu_stem={"acc,none": 0.5, "acc_stderr,none": 0.02, "n": 400},
        mmlu={"acc,none": 0.5, "acc_stderr,none": 0.02, "n": 400},
        winogrande={"acc,none": 0.8, "acc_stderr,none": 0.01},
        board={"alias": "board"},
    )
    made["group_subtasks"] = {"board": ["winogrande", "mmlu"], "mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_a", "mmlu_b"]}
    summary = summarize(made)
    assert list(summary["tasks"]) == ["winogrande", "mmlu"]
    mmlu = summary["tasks"]["mmlu"]
    assert mmlu["value"] == pytest.approx(0.4) and mmlu["stderr"] == pytest.approx(0.025)
    assert (mmlu["weighted_value"], mmlu["weighted_stderr"], mmlu["subjects"]) == (0.5, 0.02, 2)
    assert mmlu["samples"] == 400 and summary["average"] == pytest.approx(0.6)
    assert summary["average_stderr"] == pytest.approx(mean_stderr([0.01, 0.025]))


def test_no_average_where_scores_are_missing_or_point_both_ways():
    made = document(a={"acc,none": 0.2}, b={"word_perplexity,none": 12.0})
    made["higher_is_better"] = {"b": {"word_perplexity": False}}
    assert summarize(made)["average"] is None and summarize(made)["tasks"]["b"]["higher_is_better"] is False
    made = document(a={"acc,none": 0.2, "acc_stderr,none": "N/A"}, b={"acc,none": float("nan")})
    summary = summarize(made)
    assert summary["average"] is None and summary["tasks"]["b"]["value"] is None
    assert summary["tasks"]["a"]["stderr"] is None


def test_a_task_without_a_number_is_an_error(here, monkeypatch):
    """The document is kept, hours may be in it, but the run does not look like one that succeeded."""

    monkeypatch.setattr(
        "merge_and_evaluate.scoring.evaluate", lambda *_, **__: document(colours={"acc,none": float("nan")})
    )
    with pytest.raises(DataError, match="gave no number for task 'colours'"):
        score("west")
    assert (here / "results.json").is_file()


# --- refusals -------------------------------------------------------------------------------------


def recipe_with(**keys) -> dict:
    return {key: value for key, value in {**RECIPE, **keys}.items() if value is not None}


def models_with(**parameters) -> list[dict]:
    return [RECIPE["models"][0], {"model": "./west", "parameters": parameters}]


RECIPE_REFUSALS = [
    (
        recipe_with(dtyp="float16"),
        "unknown key 'dtyp' in the recipe; known: modules, slices, models, merge_method, base_model, dtype, "
        "tokenizer_source, tokenizer, chat_template, out_dtype, parameters",
    ),
    (
        recipe_with(models=[{"model": "./wild", "weight": 1.0}]),
        "unknown key 'weight' in models; known: model, parameters",
    ),
    (recipe_with(merge_method="tias"), "unknown merge_method 'tias'; known: "),
    (recipe_with(models=models_with(weight="much")), "model ./west: weight is 'much'; it must be a finite number"),
    (recipe_with(models=models_with(weight=True)), "model ./west: weight is True; it must be a finite number"),
    (recipe_with(models=models_with(weight=float("nan"))), "model ./west: weight is nan; it must be a finite number"),
    (recipe_with(models=models_with()), "model ./west has no weight; merge_method task_arithmetic needs one per model"),
    (
        recipe_with(models=models_with(weight=1.0, density=0.5)),
        "model ./west: merge_method task_arithmetic ignores the parameter 'density'; it uses int8_mask, normalize, "
        "rescale, lambda, weight",
    ),
    (
        recipe_with(models=models_with(weight=1.0, normalize=True)),
        "model ./west: 'normalize' holds for the whole merge and is ignored here; move it to the `parameters` at the "
        "end of the recipe",
    ),
    (
        recipe_with(models=[RECIPE["models"][0], {"model": "./pruned_vector_x", "parameters": {"weight": 1}}]),
        "model ./pruned_vector_x is not there; run prune_task_vector_7b.py first (README, 'Sparsification of Task "
        "Vectors'), or fix the path",
    ),
    (
        recipe_with(base_model="./Mistral-7b-v0.1-float16"),
        "model ./Mistral-7b-v0.1-float16 is not there; run convert_dtype.py first (README, 'Convert dtype'), or fix "
        "the path",
    ),
    (
        recipe_with(models=models_with(weight=1.0) + [{"model": "./a+b", "parameters": {"weight": 1}}]),
        "'./a+b': mergekit takes '+' and '@' in a path for a LoRA or a revision, and there is no such directory; fix "
        "the path, or merge the LoRA and download the revision first",
    ),
    (recipe_with(base_model=None), "merge_method task_arithmetic: Merge method requires a base input; fix the recipe"),
    (recipe_with(models=RECIPE["models"] * 2), "merge_method task_arithmetic: Duplicate merge inputs; fix the recipe"),
    (recipe_with(base_model=""), "the path of a model is empty; write it out, or leave out the entry"),
    (recipe_with(models=models_with(weight=[])), "model ./west has no weight; "),
    (recipe_with(dtype="half"), "dtype is 'half'; it must be one of float16, bfloat16, float32, float64"),
    (recipe_with(chat_template="{x"), "mergekit could not make the tokenizer that `chat_template` asks for"),
    (recipe_with(models=None), "Exactly one of 'models', 'slices', or 'modules' must be present"),
    (recipe_with(models=7), "models: Input should be a valid list; fix the recipe"),
    (["models"], "found list; it must be a mapping of keys to values"),
]


@pytest.mark.parametrize(("recipe", "line"), RECIPE_REFUSALS, ids=[line[:40] for _, line in RECIPE_REFUSALS])
def test_refused_recipes(here, recipe, line):
    write_yaml(here / "recipe.yml", recipe)
    with pytest.raises(DataError) as error:
        merge()
    assert str(error.value).startswith("recipe.yml: ") and line in str(error.value) and "\n" not in str(error.value)
    assert left_over(here) == set()


def test_refused_files(here):
    for name, content, line in [
        ("none.yml", None, "none.yml: no such recipe; the ones that come with this collection are in recipes/"),
        ("broken.yml", b"a: [", "broken.yml: no valid YAML"),
        ("binary.yml", b"\x80\x81", "binary.yml: no valid YAML"),
    ]:
        if content is not None:
            (here / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            script.main(["--recipe", name, "--merge_only"])
        assert str(error.value).startswith(line)


def test_vocabularies_that_differ_are_refused(here, tmp_path_factory):
    bigger = save_model(tmp_path_factory.mktemp("other") / "bigger", seed=5, vocab=24)
    write_yaml(here / "recipe.yml", recipe_with(models=[{"model": str(bigger), "parameters": {"weight": 1.0}}]))
    with pytest.raises(
        DataError, match=rf"tensor '.*' is \[24, 32\] in {bigger} but \[20, 32\] in ./base; the vocabularies differ"
    ):
        merge()
    assert left_over(here) == set()


def test_float16_overflow_is_refused_and_leaves_nothing(here):
    """Infinite weights would be published by mergekit without a word."""
    write_yaml(here / "recipe.yml", recipe_with(models=models_with(weight=1e6)))
    with pytest.raises(
        DataError,
        match=r"tensor '.*' of the merge by recipe.yml has \d+ values that are NaN or infinite "
        r"in float16; lower the weights, or set out_dtype",
    ):
        merge("--engine", "mergekit")
    with pytest.raises(
        DataError, match="tensor '.*' of the merge: a sum is beyond the largest float16; lower the weights"
    ):
        merge()
    assert left_over(here) == set()


def test_output_that_is_an_input_is_refused(here):
    with pytest.raises(DataError, match="overlap"):
        script.main(["--recipe", "recipe.yml", "--save_path", "west", "--merge_only", "--overwrite"])


EVAL_REFUSALS = [
    ({**EVAL, "task": "x"}, "eval.yml: unknown key 'task'; lm_eval knows config, model, "),
    (
        {**EVAL, "tasks": ["colors"]},
        "eval.yml: lm-eval knows no task 'colors'; `lm_eval ls tasks` lists its own, include_path adds yours",
    ),
    ({**EVAL, "tasks": []}, "eval.yml: tasks is [], needed is a list of task names"),
    (
        {**EVAL, "include_path": "./taks"},
        "eval.yml: include_path ./taks is not a directory, seen from here or from the recipe",
    ),
    ({**EVAL, "device": "cuda:7"}, "device 'cuda:7' is not there: torch sees "),
    ({**EVAL, "device": "gpu"}, "torch does not know device 'gpu'; try cpu, cuda, cuda:0 or mps"),
    ({**EVAL, "wandb_args": {}}, "eval.yml: 'wandb_args' is for `lm_eval run` itself; leave it out here"),
    ({**EVAL, "model_args": 5}, "eval.yml: model_args is 5, needed is a mapping"),
    ({**EVAL, "include_path": 5}, "eval.yml: include_path is 5, needed is text"),
    (
        {**EVAL, "seed": "x"},
        "eval.yml: lm-eval refuses it: seed values must be integers or None, got 'x'; fix the recipe",
    ),
    (
        {**EVAL, "model": "hff"},
        "eval.yml: lm-eval does not know model 'hff'; hf is transformers, vllm is vLLM",
    ),
    (
        {**EVAL, "model": "vllm"},
        "eval.yml: model 'vllm' needs the package vllm, which is not installed; install it, or use model: hf",
    ),
]


def refusals() -> list:
    """The cases; slow where lm-eval makes a list of all its tasks to say that one is none of them."""
    slow = {line: pytest.mark.slow for _, line in EVAL_REFUSALS if "knows no task" in line}
    return [pytest.param(*case, marks=slow.get(case[1], ()), id=case[1][:40]) for case in EVAL_REFUSALS]


@pytest.mark.parametrize(("recipe", "line"), refusals())
def test_refused_eval_recipes(here, recipe, line):
    write_yaml(here / "eval.yml", recipe)
    with pytest.raises(DataError) as error:
        score("west")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert left_over(here) == set()


def test_results_that_are_there_are_not_touched(here):
    (here / "results.json").write_text("precious")
    with pytest.raises(DataError, match="results.json: already there; give --overwrite to replace it"):
        merge_and_score()
    assert (here / "results.json").read_text() == "precious" and left_over(here) == {"results.json"}


def test_lm_eval_run_files_can_be_read(here):
    """A file that `lm_eval run` wrote has no summary; it is computed."""
    (here / "results_x.json").write_text(json.dumps(document(winogrande={"acc,none": 0.5})))
    assert read_results("results_x.json")["summary"]["average"] == 0.5
    (here / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="other.json: has no `results`"):
        read_results("other.json")


USAGE_ERRORS = [
    (["--merge_only", "--eval_only"], "--eval_only does not go with --merge_only"),
    (["--eval_only", "--recipe", "a.yml"], "--eval_only does not go with --recipe"),
    (["--merge_only", "--output_path", "a.json"], "--merge_only does not go with --output_path"),
    (["--merge_only", "--weights", "1"], "--merge_only does not go with --weights"),
    (["--weights", "1", "--weight_grid", "1"], "--weights does not go with --weight_grid"),
    (["--weights", "nan"], "argument --weights: 'nan' is not a finite number"),
    (["--choose_on", "a"], "--choose_on needs --weights or --weight_grid or --search, or several recipes"),
    (["--keep_models"], "--keep_models needs --weights or --weight_grid or --search, or several recipes"),
    (["--weights", "1", "--report_on", "a"], "--report_on needs --choose_on"),
    (["--compare", "a.json", "--recipe", "a.yml"], "--compare does not go with --recipe"),
    (["--plot_path", "a.png"], "--plot_path needs --compare"),
    (["--batch_size", "0"], "argument --batch_size: '0' is not a whole number of at least 1"),
]


@pytest.mark.parametrize(("flags", "line"), USAGE_ERRORS, ids=[line for _, line in USAGE_ERRORS])
def test_usage_errors(flags, line, capsys):
    with pytest.raises(SystemExit) as exit_status:
        script.parse_args(flags)
    assert exit_status.value.code == 2 and capsys.readouterr().err.endswith(f"error: {line}\n")


def test_exit_codes(here):
    """The process itself: 1 and one line for bad data."""
    found = subprocess.run(
        [sys.executable, ROOT / "merge_and_evaluate_7b.py", "--recipe", "none.yml", "--merge_only"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr == "error: none.yml: no such recipe; the ones that come with this collection are in recipes/\n"


def test_several_processes_do_not_merge(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="several processes were started, and a merge needs one"):
        merge("--engine", "mergekit")


def test_what_a_killed_merge_left_is_not_published(here):
    (here / "merged.part").mkdir()
    (here / "merged.part" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="left by another"):
        merge()
    merge("--engine", "mergekit")
    assert {path.name for path in (here / "merged").glob("*.safetensors")} == {"model.safetensors"}
    assert left_over(here) == {"merged"}
