"""One line before a model is scored: what, how much of it, how."""

from collections.abc import Sequence

from common.errors import DataError
from merge_and_evaluate.eval_machine import device_of, dtype_is_raised, stored_dtype
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_settings import children, shots
from merge_and_evaluate.eval_tasks import Tasks


def documents_of(task):
    """A task's documents; lm-eval keeps them, and maps the data set anew whenever it is asked for `eval_docs`."""
    return getattr(task, "task_docs", None) or task.eval_docs


def items_to_score(recipe: EvalRecipe, task) -> Sequence[int]:
    """The numbers of a task's documents that are scored: those that the recipe's `samples` names, or the first by its
    limit (a count, or a share below 1)."""
    from lm_eval.evaluator_utils import get_sample_size

    count = len(documents_of(task))
    if named := recipe.samples.get(task.config.task):  # as lm-eval has it: an empty list names all
        if max(named) >= count:
            raise DataError(
                f"{recipe.path}: samples names item {max(named)} of {task.config.task}, which has {count}; they count "
                "from 0"
            )
        return sorted(set(named))
    limit = get_sample_size(task, recipe.config.get("limit"))
    return range(count if limit is None else min(count, limit))


def requests_of(task, items: Sequence[int]) -> int:
    """How many answers a model gives for the documents of these numbers: one each, or one for every choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return len(items)
    fixed = task.config.doc_to_choice
    if isinstance(fixed, list):
        return len(items) * len(fixed)
    wanted = set(items)
    return sum(len(task.doc_to_choice(doc)) for number, doc in enumerate(documents_of(task)) if number in wanted)


def requests_to_make(recipe: EvalRecipe, loaded: dict) -> int:
    """How many answers scoring one model on all loaded tasks takes."""
    return sum(requests_of(task, items_to_score(recipe, task)) for task in loaded["tasks"].values())


def shots_of(recipe: EvalRecipe, task) -> int:
    """The demonstrations in a loaded task's prompts."""
    return shots(task.get_config("num_fewshot"), recipe.config.get("num_fewshot"))


def announcement(recipe: EvalRecipe, model: str, directory: str, loaded: dict) -> str:
    """One line on what is about to be scored, and how: "scoring merged: arc_challenge 1172 items 25-shot, …".

    `model` is what it is called; `directory` holds its config.json."""
    parts, requests = [], requests_to_make(recipe, loaded)
    for root in sorted_rows(loaded):
        leaves = [loaded["tasks"][leaf] for leaf in leaves_below(loaded, root)]
        counts = [len(items_to_score(recipe, task)) for task in leaves]
        counted = sorted({shots_of(recipe, task) for task in leaves})
        size = f" ({len(leaves)} tasks)" if len(leaves) > 1 else ""
        parts.append(f"{root}{size} {sum(counts):,} items {'/'.join(map(str, counted))}-shot")
    dtype = recipe.model_args.get("dtype") or stored_dtype(directory) or "its own dtype"
    note = " (stored as float16, which is slow on a CPU)" if dtype_is_raised(recipe, directory) else ""
    device, batch = device_of(recipe), recipe.config.get("batch_size", 1)
    limit = f"; limit {recipe.config['limit']}" if recipe.config.get("limit") is not None else ""
    return (
        f"scoring {model}: {', '.join(parts)}; {dtype}{note} on {device}, batch size {batch}{limit}; "
        f"{requests:,} requests"
    )


def leaves_below(loaded: dict, name: str) -> list[str]:
    """The tasks under a loaded group, or the task itself."""
    if name in loaded["tasks"]:
        return [name]
    return [leaf for child in loaded["group_map"].get(name, []) for leaf in leaves_below(loaded, child)]


def planned(tasks: Tasks, given: int | None) -> str:
    """Tasks with their shots from the task files alone, no data read: "arc_challenge 25-shot, mmlu 5-shot (57
    tasks)".
    """
    index, of_leaf = tasks.manager.task_index, tasks.shots(given)
    waiting, parts = list(tasks.names), []
    while waiting:
        name = waiting.pop(0)
        below = children(index, name) if name in index else []
        if below and not (index[name].cfg or {}).get("aggregate_metric_list"):
            waiting = below + waiting
            continue
        leaves = tasks.only([name]).leaves if name in index else [name]
        numbers = sorted({of_leaf[leaf] for leaf in leaves if of_leaf.get(leaf) is not None})
        size = f" ({len(leaves)} tasks)" if len(leaves) > 1 else ""
        parts.append(f"{name} {'/'.join(map(str, numbers))}-shot{size}" if numbers else name)
    return ", ".join(parts)


def sorted_rows(loaded: dict) -> list[str]:
    """What is worth a part of the announcement: top-level tasks and groups, groups without a score opened."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    waiting = [name for name in [*loaded["tasks"], *loaded["groups"]] if name not in inner]
    rows = []
    while waiting:
        name = waiting.pop(0)
        group = loaded["groups"].get(name)
        if group is not None and not group.has_aggregation:
            waiting = list(loaded["group_map"][name]) + waiting
        else:
            rows.append(name)
    return rows
