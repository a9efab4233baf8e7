"""Faults that a review found in scoring and comparing: each test failed on the code as it was."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import first_quick
from long_tasks import EVAL as LONG
from long_tasks import LOSS, change_task, group_of, results, whole_document
from recipes_and_models import EVAL, left_over, merge, merge_and_score, score, write_yaml
from results_files import save, scored

import merge_and_evaluate_7b
from common.errors import DataError
from merge_and_evaluate import choosing, eval_machine, evaluation, scoring
from merge_and_evaluate.announcement import announcement, requests_to_make
from merge_and_evaluate.eval_recipes import read_eval_recipe
from merge_and_evaluate.eval_tasks import Tasks, find_tasks
from merge_and_evaluate.evaluation import eval_identity, load_tasks
from merge_and_evaluate.scores import summarize, task_summary

# --- where results go -----------------------------------------------------------------------------


def not_scored(*_, **__):
    pytest.fail("a model is scored")


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_directory_is_no_results_file(here, monkeypatch, flags):
    """Said before hours of scoring, not after them."""
    monkeypatch.setattr(scoring, "evaluate", not_scored)
    (here / "out").mkdir()
    with pytest.raises(DataError, match="out: a directory; give a file's name"):
        score("base", "--output_path", "out", *flags)


def test_results_of_one_merge_may_go_into_its_directory(here, monkeypatch):
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    merge_and_score("--output_path", "merged/results.json")
    merge_and_score("--output_path", "merged/results.json", "--overwrite")
    assert (here / "merged" / "results.json").is_file() and left_over(here) == {"merged"}


# --- finished scores ------------------------------------------------------------------------------


def test_the_same_command_again_takes_its_scores(here, monkeypatch, capsys):
    """Also where another model was merged into the directory since; other settings are refused before the merge."""
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    merge_and_score()
    before = json.loads((here / "results.json").read_text())
    shutil.rmtree(here / "merged")
    monkeypatch.setattr(scoring, "evaluate", not_scored)
    merge_and_score("--dry_run")
    merge_and_score()
    assert "merged was scored by this recipe before: its scores are taken from results.json" in capsys.readouterr().out
    assert json.loads((here / "results.json").read_text()) == before and (here / "merged").is_dir()
    shutil.rmtree(here / "merged")
    with pytest.raises(DataError, match="results.json: already there; give --overwrite"):
        merge_and_score("--limit", "3")
    assert not (here / "merged").exists()


def test_scores_are_not_lost_for_a_card(here, monkeypatch, capsys):
    """A directory in the card's place stands for a model in a store that is only read."""
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    merge("--overwrite")
    (here / "merged" / "README.md").unlink()
    (here / "merged" / "README.md").mkdir()
    score("merged")
    said = capsys.readouterr().out
    assert "note: the scores are not in merged/README.md: Is a directory" in said and "wrote results.json" in said
    score("merged")  # from before


def test_a_card_of_another_encoding_is_left_alone(here, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    merge()
    (here / "merged" / "README.md").write_bytes(b"\xff\xfe")
    score("merged")
    assert "note: the scores are not in merged/README.md: " in capsys.readouterr().out
    assert (here / "merged" / "README.md").read_bytes() == b"\xff\xfe"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that even root cannot read")
def test_a_strangers_file_beside_the_results_stops_nothing(here, monkeypatch):
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    (here / "another.json").symlink_to("/proc/self/mem")
    score("base")
    assert results(here)["summary"]["name"] == "base"


def test_nor_does_a_half_of_a_copy(here, monkeypatch):
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    score("base")
    text = (here / "results.json").read_text()
    (here / "copy.json").write_text(text[: text.index('"identity"') + 200])
    (here / "results.json").unlink()
    score("base")
    assert results(here)["summary"]["name"] == "base"


# --- an eval recipe's keys ------------------------------------------------------------------------


def test_an_empty_model_is_transformers_everywhere(here):
    write_yaml(here / "eval.yml", {**EVAL, "model": None, "device": "cpu"})
    assert eval_machine.on_this_machine(read_eval_recipe("eval.yml"), "base").model_args == {"dtype": "float32"}


@pytest.mark.parametrize("samples", [{"colours": [0, 1, 1]}, '{"colours": [0, 1]}'])
def test_items_that_a_recipe_names_are_counted(here, samples):
    """Of the other tasks all are scored; each of the six items has six choices."""
    write_yaml(here / "eval.yml", {**EVAL, "samples": samples})
    recipe = read_eval_recipe("eval.yml")
    loaded = load_tasks(recipe, find_tasks(recipe, recipe.tasks))
    said = announcement(recipe, "base", "base", loaded)
    assert "colours 2 items 0-shot, shades 6 items 0-shot" in said and said.endswith("; 48 requests")


def test_requests_are_those_of_the_items_that_are_named(here):
    """The last item has two choices, the others six."""
    path = here / "tasks" / "colours.jsonl"
    *others, last = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [*others, {**last, "choices": last["choices"][-2:], "gold": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["colours"], "samples": {"colours": [0, 5]}})
    recipe = read_eval_recipe("eval.yml")
    assert requests_to_make(recipe, load_tasks(recipe, find_tasks(recipe, ["colours"]))) == 8


@pytest.mark.parametrize("samples", [["colours"], {"colours": 2}, {"colours": ["0"]}, {"colours": [-1]}])
def test_samples_that_are_none_are_refused(here, samples):
    write_yaml(here / "eval.yml", {**EVAL, "samples": samples})
    with pytest.raises(DataError, match="eval.yml: (samples is .*, needed is a mapping of tasks|lm-eval refuses it)"):
        read_eval_recipe("eval.yml")


def test_items_that_a_task_does_not_have_are_refused_before_the_merge(here):
    """lm-eval would say so once the model is loaded."""
    write_yaml(here / "eval.yml", {**EVAL, "samples": {"colours": [0, 6]}})
    recipe = read_eval_recipe("eval.yml")
    with pytest.raises(DataError, match="eval.yml: samples names item 6 of colours, which has 6; they count from 0"):
        requests_to_make(recipe, load_tasks(recipe, find_tasks(recipe, recipe.tasks)))


@pytest.mark.slow
def test_a_row_of_named_items_says_so_in_tables(here, capsys):
    score("base")
    write_yaml(here / "eval.yml", {**EVAL, "samples": {"colours": [0, 1]}})
    score("base", "--output_path", "part.json", "--name", "part")
    assert "| part (samples) | metric | shots | items | score |" in capsys.readouterr().out
    merge_and_evaluate_7b.main(["--compare", "results.json", "part.json"])
    said = capsys.readouterr().out
    assert "| part (samples) |" in said and "- limits differ: base all items, part samples" in said


# --- several processes ----------------------------------------------------------------------------


def test_merge_only_is_not_told_to_take_merge_only(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "several processes were started, and a merge needs one: mergekit merges this recipe (--engine mergekit); "
    with pytest.raises(DataError, match=re.escape(line + "start it without torchrun")):
        merge("--engine", "mergekit")
    with pytest.raises(DataError, match="a merge needs one: merge with --merge_only, then score with `accelerate"):
        merge_and_score()


# --- NaN ------------------------------------------------------------------------------------------


def test_a_model_of_nan_is_said_where_gold_chooses(tmp_path):
    document = {"summary": {"tasks": {"a": {}}}, "items": {"a": {"gold": [0.5, math.nan], "value": [1, 0]}}}
    with pytest.raises(DataError, match="r.json: task 'a': the model gives NaN; lower its weight"):
        choosing.gold_average(document, "r.json")


# --- what a score's identity holds ----------------------------------------------------------------


def identity() -> str:
    recipe = read_eval_recipe("eval.yml")
    return eval_identity(recipe, find_tasks(recipe, ["colours"]), "model")


def test_scores_of_a_cpu_and_of_a_gpu_are_not_the_same(here, monkeypatch):
    """The recipe names no device: this machine's decides, and with it the dtype."""
    write_yaml(here / "eval.yml", {"include_path": "./tasks", "tasks": ["colours"]})
    on_cpu = identity()
    for known in (eval_machine, evaluation):
        monkeypatch.setattr(known, "device_of", lambda recipe: "cuda:1", raising=False)
    assert identity() != on_cpu


def test_an_identity_is_the_same_in_every_run(here):
    """A group's settings hold functions, whose text has their address in memory."""
    write_yaml(here / "eval.yml", {"include_path": "./tasks", "tasks": ["colours"]})

    found = set()
    for _ in range(2):
        namespace = {}
        exec("def process(docs):\n    return docs", namespace)
        found.add(namespace["process"])
    identities = set()
    for function in found:
        with pytest.MonkeyPatch.context() as settings:
            settings.setattr(Tasks, "part", property(lambda self, f=function: [{"process_docs": f}]))
            identities.add(identity())
    assert len(found) == 2 and len(identities) == 1


# --- another model's results ----------------------------------------------------------------------


def test_scores_from_beside_do_not_replace_another_models(here, monkeypatch):
    """wild was scored into b.json: so it is not scored again, but results.json is base's."""
    monkeypatch.setattr(scoring, "evaluate", whole_document)
    score("base", "--output_path", "out/results.json")
    score("wild", "--output_path", "out/b.json")
    before = (here / "out" / "results.json").read_text()
    with pytest.raises(DataError, match="out/results.json: already there; give --overwrite"):
        score("wild", "--output_path", "out/results.json")
    assert (here / "out" / "results.json").read_text() == before
    score("wild", "--output_path", "out/b.json", "--name", "again")
    assert json.loads((here / "out" / "b.json").read_text())["summary"]["name"] == "again"


# --- groups ---------------------------------------------------------------------------------------


def test_a_task_in_a_group_written_in_place_is_held_out(here, capsys):
    group_of(here, "outer", [{"group": "stem", "task": ["colours", "shades"]}, "tints"])
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["outer"]})
    flags = ("--weights", "0.5", "1", "--dry_run")
    merge_and_score(*flags, "--choose_on", "colours")
    said = capsys.readouterr().out.splitlines()
    assert "choose  on colours 0-shot" in said and "report  on shades 0-shot, tints 0-shot" in said
    merge_and_score(*flags, "--choose_on", "tints")
    assert "report  on colours 0-shot, shades 0-shot" in capsys.readouterr().out.splitlines()
    with pytest.raises(DataError, match="task 'shades' would choose the weight and report it"):
        merge_and_score(*flags, "--choose_on", "outer", "--report_on", "shades")


def test_a_group_of_groups_points_the_way_its_tasks_do():
    """lm-eval gives directions to groups in the order it loads them: outer gets none from inner, which has none yet."""
    document = {
        "results": {name: {"acc,none": 0.2} for name in ("outer", "inner", "colours", "tints")},
        "group_subtasks": {"outer": ["inner"], "inner": ["colours", "tints"]},
        "higher_is_better": {name: {"acc": False} for name in ("inner", "colours", "tints")},
    }
    assert task_summary(document, "outer")["higher_is_better"] is False
    document["higher_is_better"] |= {"tints": {"acc": True}, "inner": {"acc": None}}
    assert task_summary(document, "outer")["higher_is_better"] is True


@pytest.mark.slow
def test_a_sweep_chooses_the_same_of_a_group_of_groups(here, long_tasks):
    for task in ("colours", "tints"):
        change_task(here, task, **LOSS)
    group_of(here, "inner", ["colours", "tints"], aggregate_metric_list=[{"metric": "acc"}])
    group_of(here, "outer", ["inner"], aggregate_metric_list=[{"metric": "acc"}])
    chosen = {}
    for name in ("inner", "outer"):
        write_yaml(here / "eval.yml", {**LONG, "tasks": [name]})
        merge_and_score("--weights", "0.3", "0.9", "1.5", "--output_path", f"{name}.json", "--overwrite")
        chosen[name] = json.loads((here / f"{name}.json").read_text())["summary"]
    averages = [found["average"] for found in chosen["inner"]["chosen"]["candidates"]]
    assert chosen["inner"]["average"] == chosen["outer"]["average"] == min(averages) < max(averages)


def test_what_is_left_of_a_group_with_a_score_is_asked_for(here, capsys):
    """MMLU without a subject would be 56 scores in the average instead of one, and nothing said so."""
    group_of(here, "inner", ["shades", "tints"], aggregate_metric_list=[{"metric": "acc"}])
    group_of(here, "outer", ["colours", "inner"])  # has no score: its tasks are the entries anyhow
    write_yaml(here / "eval.yml", {**EVAL, "tasks": ["outer"]})
    flags = ("--weights", "0.5", "1", "--dry_run")
    line = "eval.yml: --choose_on takes a part of 'inner', and the rest of it has no score; name what to report with "
    with pytest.raises(DataError, match=re.escape(line + "--report_on")):
        merge_and_score(*flags, "--choose_on", "shades")
    for chosen in (["colours"], ["inner"], ["shades", "--report_on", "colours", "tints"]):
        merge_and_score(*flags, "--choose_on", *chosen)
    merge_and_score(*flags, "--choose_on", "colours")
    assert "report  on inner 0-shot (2 tasks)" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "group, score, mean",
    [("g", 1 / 4, (3 * math.log(0.5) + math.log(0.1)) / 4), ("g", 1 / 2, None), ("mmlu", 1 / 4, None)],
)
def test_gold_is_averaged_as_the_score_is(group, score, mean):
    """Three items of 1/2, all wrong, and one of 1/10, which is right: by items, or task by task."""
    document = {
        "summary": {"tasks": {group: {"value": score}}},
        "group_subtasks": {group: ["a", "b"]},
        "items": {"a": {"gold": [0.5] * 3, "value": [0] * 3}, "b": {"gold": [0.1], "value": [1]}},
    }
    expected = (math.log(0.5) + math.log(0.1)) / 2 if mean is None else mean
    assert choosing.gold_average(document, "x")[0] == pytest.approx(expected)


# --- tables and verdicts --------------------------------------------------------------------------


def said_of_comparing(capsys, *flags: str) -> str:
    capsys.readouterr()
    merge_and_evaluate_7b.main(["--compare", *flags])
    return capsys.readouterr().out


def without_items(name: str, scores: dict[str, float], less: tuple[str, ...] = ()) -> dict:
    """A results document of these scores; of the tasks in `less`, less is better."""
    document = {
        "results": {task: {"m,none": value, "m_stderr,none": 0.01} for task, value in scores.items()},
        "higher_is_better": {task: {"m": task not in less} for task in scores},
    }
    return document | {"summary": {"name": name, **summarize(document)}}


def test_few_items_are_said_to_be_few(here, capsys):
    save(a=scored("A", {"x": [0, 0, 0, 0, 1]}), b=scored("B", {"x": [1, 1, 1, 1, 1]}))
    assert "cannot tell: 5 items are too few |" in said_of_comparing(capsys, "a.json", "b.json")


def test_what_chance_does_among_many_rows_is_said_of_many_rows(here, capsys):
    """13 to 2 is p 0.007 for two rows alone, 0.07 among ten others."""
    rows = {"b": scored("B", {"x": [1] * 13 + [0] * 2 + [0] * 185})}
    rows |= {f"c{i}": scored(f"C{i}", {"x": [0] * 13 + [1] * 2 + [0] * 185}) for i in range(9)}
    save(a=scored("A", {"x": [0] * 13 + [1] * 2 + [0] * 185}), **rows)
    said = said_of_comparing(capsys, "a.json", *(f"{name}.json" for name in rows))
    assert "enough items for these two alone, but chance does as much among so many rows (200 items)" in said


@pytest.mark.slow
def test_a_mixed_average_is_neither_shown_nor_bold(here, capsys):
    """The rows share an accuracy and a perplexity, which no average holds; a has a third task."""
    save(
        a=without_items("A", {"x": 0.5, "wiki": 9.0, "z": 0.5}, less=("wiki",)),
        b=without_items("B", {"x": 0.75, "wiki": 8.0}, less=("wiki",)),
    )
    lines = said_of_comparing(capsys, "a.json", "b.json").splitlines()
    assert lines[2].endswith("| – |") and lines[3].endswith("| – |")
    assert "cannot tell: not every task that all rows have is in one metric and direction" in "\n".join(lines)
    save(c=without_items("C", {"y": 0.5}))
    assert "cannot tell: no task that all rows have |" in said_of_comparing(capsys, "a.json", "c.json")


def test_a_column_has_one_scale(here, capsys):
    save(a=without_items("A", {"bleu": 0.9}), b=without_items("B", {"bleu": 1.4}))
    lines = said_of_comparing(capsys, "a.json", "b.json").splitlines()
    assert lines[2] == "| A | 0.90 ± 0.01 | 0.90 ± 0.01 |" and lines[3] == "| B | **1.40 ± 0.01** | **1.40 ± 0.01** |"


@pytest.mark.parametrize("spelling", first_quick("x/../a.json", "{here}/a.json", "./a.json"))
def test_against_knows_a_file_by_any_spelling(here, capsys, spelling):
    (here / "x").mkdir()
    save(a=scored("A", {"x": [0, 1] * 9}), b=scored("B", {"x": [1, 1] * 9}))
    assert "better than A" in said_of_comparing(capsys, "b.json", "a.json", "--against", spelling.format(here=here))


@pytest.mark.parametrize(
    "content", [{}, None, [], {"tasks": {"x": {}}, "name": "a", "average": 1, "average_stderr": 1}]
)
def test_a_summary_that_is_none_is_refused(here, content):
    save(a={"results": {}, "summary": content})
    with pytest.raises(DataError, match="a.json: its `summary` is not as this script writes it; score the model again"):
        merge_and_evaluate_7b.main(["--compare", "a.json"])


# --- sweeps and recipes ---------------------------------------------------------------------------


def test_a_file_of_another_kind_is_no_score(here):
    save(**{"results_weight_0.5": {"results": {}, "provenance": None, "summary": None}})
    with pytest.raises(DataError, match="results_weight_0.5.json: already there"):
        merge_and_score("--weights", "0.5")


@pytest.mark.parametrize(
    "key, value, needed",
    [
        *(("limit", value, "a number above 0") for value in ("20", -5, 0, True, [1])),
        *(("num_fewshot", value, "a whole number, 0 or more") for value in ([1], "5", -1, 1.5, True)),
    ],
)
def test_limits_and_shots_that_are_none_are_refused(here, key, value, needed):
    write_yaml(here / "eval.yml", {**EVAL, key: value})
    with pytest.raises(DataError, match=re.escape(f"eval.yml: {key} is {value!r}, needed is {needed}")):
        read_eval_recipe("eval.yml")


def test_the_model_is_not_named_twice(here):
    write_yaml(here / "eval.yml", {**EVAL, "model_args": "pretrained=other,max_length=32"})
    assert read_eval_recipe("eval.yml").model_args == {"max_length": 32}
    with pytest.raises(
        DataError, match="--model_args pretrained=other: the model that is scored is --save_path; leave"
    ):
        score("base", "--model_args", "pretrained=other")


def test_a_task_without_items_is_not_said_to_be_no_choice():
    document = {"summary": {"tasks": {"a": {"value": 0.5}}}, "items": {}}
    with pytest.raises(DataError, match=r"r.json: has no items of task 'a' \(its score may not be a mean over them\)"):
        choosing.gold_average(document, "r.json")


# --- what is proved -------------------------------------------------------------------------------


def test_a_task_of_five_items_decides_nothing(here, capsys):
    other = [0, 1] * 20 + [1] * 160
    save(a=scored("A", {"x": [0] * 5, "y": other}), b=scored("B", {"x": [1] * 5, "y": other[1:] + [1]}))
    said = said_of_comparing(capsys, "a.json", "b.json")
    assert "cannot tell" in said and "better than" not in said


def test_differences_that_cancel_are_said_to_be_none(here, capsys):
    """One item more, two more, three fewer of 10: 0.1 + 0.2 - 0.3."""
    first, values = [0] * 5 + [1] * 5, {"x": (1, 0), "y": (2, 0), "z": (0, 3)}
    second = {task: [1] * up + [0] * (5 - up) + [0] * down + [1] * (5 - down) for task, (up, down) in values.items()}
    save(a=scored("A", dict.fromkeys(values, first)), b=scored("B", second))
    assert "cannot tell: no difference on 30 items |" in said_of_comparing(capsys, "a.json", "b.json")


def test_what_scored_it_is_told_apart(here, capsys):
    """Another backend, other settings of what it generates, another kind of device; hf-auto is hf by another name."""
    config = {"model_dtype": "torch.bfloat16", "limit": None, "model_args": {}, "device": None, "gen_kwargs": None}
    first = scored("A", {"x": [0, 1]}, config={**config, "model": "hf", "device": "cuda:0"})
    second = scored("B", {"x": [0, 1]}, config={**config, "model": "vllm", "gen_kwargs": {"top_p": 1, "do_sample": 0}})
    third = scored("C", {"x": [0, 1]}, config={**config, "model": "hf-auto", "device": "cuda:1"})
    second["provenance"]["device"] = "cpu"
    save(a=first, b=second, c=third)
    lines = said_of_comparing(capsys, "a.json", "b.json").splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        "- backends differ: A hf, B vllm",
        "- gen_kwargs differ: A none, B do_sample=0,top_p=1",
        "- devices differ: A cuda, B cpu",
    ]
    assert "- " not in said_of_comparing(capsys, "a.json", "c.json")


@pytest.mark.slow
def test_the_device_is_recorded_where_no_recipe_names_one(here):
    score("base")
    assert results(here)["provenance"]["device"] == eval_machine.device_of(read_eval_recipe("eval.yml"))
