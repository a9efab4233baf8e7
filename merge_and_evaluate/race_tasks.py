"""What a race asks of lm-eval's tasks: which items count how much, by which metric; scoring some of them."""

import json
from contextlib import nullcontext
from itertools import islice

from common.errors import DataError, reason_of
from common.shards.hashing import text_hash
from merge_and_evaluate.announcement import documents_of, items_to_score, leaves_below, requests_of
from merge_and_evaluate.choosing import no_gold
from merge_and_evaluate.eval_log import logged_to
from merge_and_evaluate.eval_recipes import EvalRecipe, evaluator_config
from merge_and_evaluate.evaluation import load_tasks
from merge_and_evaluate.items import DOC_DIGITS, items_of_task
from merge_and_evaluate.race_plan import Stratum
from merge_and_evaluate.scores import OPENED_GROUPS, PLAIN_MEAN_GROUPS, main_metric
from merge_and_evaluate.scoring import Scoring


def entries_of_loaded(loaded: dict) -> list[str]:
    """The tasks and groups that count once each in the average, as scores.entries_of finds them in a document."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    waiting, entries = [name for name in [*loaded["groups"], *loaded["tasks"]] if name not in inner], []
    while waiting:
        name = waiting.pop(0)
        group = loaded["groups"].get(name)
        if group is not None and (not group.has_aggregation or name in OPENED_GROUPS):
            waiting = list(loaded["group_map"][name]) + waiting
        else:
            entries.append(name)
    return entries


def _filters(task) -> list[str]:
    return [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]


def _keys(task) -> list[str]:
    """The keys of a task's results: ["acc,none", "acc_norm,none"]."""
    return [f"{metric},{kind}" for kind in _filters(task) for metric in task.aggregation()]


def metrics_of(loaded: dict) -> dict[str, str | None]:
    """{leaf task: the metric that counts in it}, as scores.leaf_metrics finds it in a document; None: no metric."""
    found = {}
    for entry in entries_of_loaded(loaded):
        leaves, group = leaves_below(loaded, entry), loaded["groups"].get(entry)
        of_entry = None
        if group is not None:
            kinds = _filters(loaded["tasks"][leaves[0]])
            keys = [
                f"{each.metric},{kind}" for each in group.aggregate_metric_list for kind in each.filter_list or kinds
            ]
            of_entry = main_metric(entry, dict.fromkeys(keys, 0.0))
        for leaf in leaves:
            keys = _keys(loaded["tasks"][leaf])
            found[leaf] = of_entry if of_entry in keys else main_metric(leaf, dict.fromkeys(keys, 0.0))
    return found


def read_tasks(scoring: Scoring) -> dict:
    """lm-eval's tasks with their documents. Raises DataError with lm-eval's own reason where data cannot be read."""
    try:
        with logged_to(scoring.log) if scoring.log else nullcontext():
            return load_tasks(scoring.recipe, scoring.tasks)
    except Exception as error:  # lm-eval and what it uses raise many types; the user needs the reason
        names = ", ".join(scoring.tasks.names)
        raise DataError(f"{scoring.recipe.path}: lm-eval could not read {names}: {reason_of(error):.300}") from error


def check_choice(recipe: EvalRecipe, loaded: dict, by: str) -> dict[str, str | None]:
    """{leaf task: the metric that counts}. Raises DataError for tasks that cannot choose together: metrics that point
    both ways, and with `by` "gold" no right answer to choose."""
    found = metrics_of(loaded)
    for leaf in found:
        if by == "gold" and loaded["tasks"][leaf].OUTPUT_TYPE != "multiple_choice":
            raise no_gold(recipe.path, leaf)
    kinds = {larger_is_better(loaded, leaf, metric) for leaf, metric in found.items() if metric}
    if by == "score" and len(kinds) > 1:
        raise DataError(
            f"{recipe.path}: of some of {', '.join(found)} less is better, of others more, so no average can choose; "
            "name tasks of one kind with --choose_on"
        )
    return found


def check_race(recipe: EvalRecipe, loaded: dict, metrics: dict[str, str | None]) -> None:
    """DataError for what a race cannot average item by item, and for a `samples` that is not the race's."""
    if recipe.config.get("samples"):
        raise DataError(f"{recipe.path}: has `samples`, which a race sets itself; leave it out, or use `limit`")
    for leaf, metric in metrics.items():
        name = metric.partition(",")[0] if metric else None
        if not name or getattr(loaded["tasks"][leaf].aggregation().get(name), "__name__", "mean") != "mean":
            raise DataError(
                f"{recipe.path}: task {leaf!r}: {name or 'its score'} is not a mean over items, and a race needs one; "
                "leave out --race, or choose on other tasks with --choose_on"
            )


def loss_note(loaded: dict, metrics: dict[str, str | None]) -> str | None:
    """What to mind where a loss chooses; None where none does."""
    losses = [leaf for leaf, metric in metrics.items() if metric and not larger_is_better(loaded, leaf, metric)]
    if not losses:
        return None
    return (
        f"{', '.join(losses)}: less is better. How well a model predicts a text says little of how it answers: tasks "
        "like those that are reported are the better choice"
    )


def larger_is_better(loaded: dict, leaf: str, metric: str) -> bool:
    """Whether a larger value of a leaf's metric is the better one."""
    return loaded["tasks"][leaf].higher_is_better().get(metric.partition(",")[0]) is not False


def strata_of_tasks(recipe: EvalRecipe, loaded: dict) -> tuple[Stratum, ...]:
    """Every leaf as a stratum, weighted as in the score that people compare: entries alike, in a group tasks by their
    items, or alike in MMLU and where the group says so. An item costs its requests: one that is generated, as gsm8k's
    are, counts as one request, though it takes longer than the likelihoods of four choices."""
    entries, strata = entries_of_loaded(loaded), []
    for entry in entries:
        leaves, group = leaves_below(loaded, entry), loaded["groups"].get(entry)
        by_size = group is None or all(each.weight_by_size for each in group.aggregate_metric_list)
        plain = entry in PLAIN_MEAN_GROUPS or not by_size
        counts = [len(items_to_score(recipe, loaded["tasks"][leaf])) for leaf in leaves]
        for leaf, count in zip(leaves, counts, strict=True):
            share = 1 / len(leaves) if plain else count / sum(counts)
            asked = requests_of(loaded["tasks"][leaf], range(count)) / count
            strata.append(Stratum(leaf, entry, count, share / len(entries), round(asked), asked))
    return tuple(strata)


def documents_hash(task, items: int) -> str:
    """One hash of a task's first `items` documents, in their order: of the first DOC_DIGITS digits of each one's hash,
    which lm-eval gives it in its samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    how = {"indent": 2, "default": handle_non_serializable, "ensure_ascii": False}  # as lm-eval's evaluator does
    hashes = (hash_string(json.dumps(doc, **how))[:DOC_DIGITS] for doc in islice(documents_of(task), items))
    return text_hash(" ".join(hashes))


# --- scoring some items ---------------------------------------------------------------------------


def _prepare(config, task) -> None:
    """Set a task up as simple_evaluate does, which would also collect the environment for seconds, once per batch."""
    if config.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=config.gen_kwargs, update=True)
    own = task.get_config("num_fewshot")
    if config.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=config.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    # Anew before every batch: all candidates of a round answer the same batch, each item after the same demonstrations.
    task.set_fewshot_seed(seed=config.seed and config.seed[3])


def _seed(config) -> None:
    """Seed what may be drawn from, as simple_evaluate does before every model."""
    import random

    import numpy as np
    import torch

    for seed, set_seed in zip(config.seed or (), (random.seed, np.random.seed, torch.manual_seed), strict=False):
        if seed is not None:
            set_seed(seed)


def score_items(lm, recipe: EvalRecipe, loaded: dict, metrics: dict, samples: dict[str, list[int]]) -> dict[str, dict]:
    """{leaf: {"doc", "value", "gold"}} of the items `samples` {leaf: numbers, ascending} on lm-eval's model `lm`.

    Raises DataError with lm-eval's own reason if it fails, or if a task's items have no values.
    """
    from lm_eval.evaluator import evaluate

    config = evaluator_config(recipe, "model")
    tasks = {leaf: loaded["tasks"][leaf] for leaf in samples}
    try:
        _seed(config)
        for task in tasks.values():
            _prepare(config, task)
        document = evaluate(
            lm=lm,
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            samples=samples,
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        )
    except Exception as error:  # lm-eval and what it uses raise many types; the user needs the reason
        line = f"{recipe.path}: lm-eval could not score {', '.join(samples)}: {reason_of(error):.300}"
        raise DataError(line) from error
    found = {}
    for leaf, numbers in samples.items():
        record = items_of_task(tasks[leaf], document["samples"][leaf], metrics[leaf])
        if record is None or len(record["value"]) != len(numbers):
            raise DataError(
                f"{recipe.path}: task {leaf!r}: lm-eval gives its items no {metrics[leaf].partition(',')[0]} of their "
                "own, and a race needs one; leave out --race, or choose on other tasks with --choose_on"
            )
        found[leaf] = record
    return found
