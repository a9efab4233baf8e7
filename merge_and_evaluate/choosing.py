"""Which tasks choose the weight and which report it; what a result is worth to whoever chooses."""

import math
from collections.abc import Mapping

from common.errors import DataError
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_settings import children
from merge_and_evaluate.eval_tasks import Tasks, check_data_files, check_task_code, find_tasks
from merge_and_evaluate.items import is_plain_mean
from merge_and_evaluate.scores import OPENED_GROUPS, leaves_of
from merge_and_evaluate.scoring import Scoring

# A right answer of less probability counts as this much: one item whose probability is rounded to 0 would otherwise
# outweigh all others.
LEAST_PROBABILITY = 1e-12

# --- tasks ----------------------------------------------------------------------------------------


def _others(recipe: EvalRecipe, tasks: Tasks, names: list[str], chosen: set[str]) -> list[str]:
    """What is left of `names` without the tasks in `chosen`: a group that holds some of these is opened. DataError for
    one that has a score: its tasks would each count as much in the average as it did."""
    left, index = [], tasks.manager.task_index
    for name in tasks.only(names).names:
        leaves = set(tasks.only([name]).leaves)
        if leaves.isdisjoint(chosen):
            left.append(name)
        elif not leaves <= chosen:
            if name not in OPENED_GROUPS and (index[name].cfg or {}).get("aggregate_metric_list"):
                raise DataError(
                    f"{recipe.path}: --choose_on takes a part of {name!r}, and the rest of it has no score; name what "
                    "to report with --report_on"
                )
            left += _others(recipe, tasks, children(index, name), chosen)
    return left


def check_tasks(recipe: EvalRecipe, tasks: Tasks) -> None:
    """Refuse tasks whose local data or code is not there: better said before the merge than after it."""
    check_data_files(recipe, tasks)
    check_task_code(recipe, tasks)


def plan_scorings(
    recipe: EvalRecipe, choose_on: list[str] | None, report_on: list[str] | None
) -> tuple[Scoring, Scoring | None]:
    """(what decides, what is reported; None for the same). Raises DataError if a task would be in both."""
    if not choose_on:
        tasks = find_tasks(recipe, recipe.tasks)
        check_tasks(recipe, tasks)
        return Scoring(recipe, tasks), None
    tasks = find_tasks(recipe, [*choose_on, *(report_on or recipe.tasks)])
    report_on = report_on or _others(recipe, tasks, recipe.tasks, set(tasks.only(choose_on).leaves))
    if not report_on:
        raise DataError(f"{recipe.path}: all its tasks are in --choose_on; name others with --report_on")
    choosing, reporting = Scoring(recipe, tasks.only(choose_on)), Scoring(recipe, tasks.only(report_on))
    for scoring_of in (choosing, reporting):
        check_tasks(recipe, scoring_of.tasks)
    both = set(choosing.tasks.leaves) & set(reporting.tasks.leaves)
    if both:
        raise DataError(
            f"{recipe.path}: task {min(both)!r} would choose the weight and report it; "
            "name what to report with --report_on"
        )
    return choosing, reporting


# --- values ---------------------------------------------------------------------------------------


def value_of(document: dict, path, by: str) -> float:
    """What a results document is worth, larger is better: the average score, or with `by` "gold" the mean
    log-probability of the right answers. Raises DataError where its tasks have no such value in common."""
    return gold_average(document, path)[0] if by == "gold" else average_to_choose_by(document, path)


def average_to_choose_by(document: dict, path) -> float:
    """The average, such that larger is better. Raises DataError where tasks have none in common."""
    summary = document["summary"]
    if summary["average"] is None:
        raise DataError(
            f"{path}: its tasks have no common average (some say that less is better), so no weight can be "
            "chosen by it; name tasks of one kind with --choose_on"
        )
    less_is_better = any(not task["higher_is_better"] for task in summary["tasks"].values())
    return -summary["average"] if less_is_better else summary["average"]


def log_golds(golds: list[float | None], path, task: str, model: str = "") -> list[float]:
    """The log-probabilities of a task's right answers, in nats: [0.5] -> [-0.693]. Raises DataError where one has none,
    or NaN; path and model: for the error."""
    if None in golds:
        raise no_gold(path, task)
    if any(map(math.isnan, golds)):
        raise gives_nan(path, task, model)
    return [math.log(max(gold, LEAST_PROBABILITY)) for gold in golds]


def gold_average(document: dict, path) -> tuple[float, float | None]:
    """The mean log-probability of the right answer and its standard error, in nats, tasks weighted as in the score."""
    return mean_log_gold(leaf_weights(document), document.get("items", {}), path)


def leaf_weights(document: dict) -> dict[str, float]:
    """{leaf task: its share of the average}, as in the score: each entry counts the same, in a group each item, or each
    task where the group's score is the mean of its tasks."""
    weights, entries, items = {}, document["summary"]["tasks"], document.get("items", {})
    for entry, summary in entries.items():
        leaves = leaves_of(document, entry)
        values = [items.get(leaf, {}).get("value", []) for leaf in leaves]
        plain = not all(values) or is_plain_mean(entry, values, summary.get("value"))
        counts = [1 if plain else len(of_leaf) for of_leaf in values]
        weights |= {leaf: count / sum(counts) / len(entries) for leaf, count in zip(leaves, counts, strict=True)}
    return weights


def mean_log_gold(weights: Mapping[str, float], items: Mapping[str, dict], path) -> tuple[float, float | None]:
    """The weighted mean over leaf tasks of their items' log-probabilities of the right answer, and its standard error,
    in nats; the error is None where a task has one item. items: {leaf: record}; path: for the error."""
    mean, variance = 0.0, 0.0
    for leaf, weight in weights.items():
        if leaf not in items:
            raise DataError(
                f"{path}: has no items of task {leaf!r} (its score may not be a mean over them), so no probability of "
                "its right answers; choose on others with --choose_on, or --choose_by score"
            )
        logs = log_golds(items[leaf]["gold"], path, leaf)
        middle = math.fsum(logs) / len(logs)
        mean += weight * middle
        squares = math.fsum((value - middle) ** 2 for value in logs)
        variance += weight**2 * squares / (len(logs) - 1) / len(logs) if len(logs) > 1 else math.nan
    return mean, None if math.isnan(variance) else math.sqrt(variance)


def gives_nan(path, task: str, model: str = "") -> DataError:
    """What to raise for a model whose outputs are not numbers; model: its name, where the path does not tell."""
    of_model = f"the model of {model}" if model else "the model"
    return DataError(f"{path}: task {task!r}: {of_model} gives NaN; lower its weight, or score with --dtype bfloat16")


def no_gold(path, task: str) -> DataError:
    """What to raise for a task whose questions have no right answer to choose."""
    return DataError(
        f"{path}: task {task!r} is not multiple choice, or has a question without a right answer, so there is no "
        "probability of right answers; choose on others with --choose_on, or --choose_by score"
    )
