"""Item by item: what a model scored on every question, and which items two rows share.

`items` of a results file: {task: {"doc": […], "value": […], "gold": […]}}, parallel lists in lm-eval's order.
doc: the first 16 hex digits of lm-eval's doc_hash. value: the item's score in the leaderboard metric, so that the
mean of the values is the task's score. gold: multiple choice, the probability of the right answer; else null.
"""

import math
from dataclasses import dataclass

from common.errors import DataError
from merge_and_evaluate import scores

DOC_DIGITS = 16
# Mean of items and score are the same sum of the same floats, in another order; a metric that is float32 lm-eval adds
# up in float32.
FITS = 1e-6


@dataclass(frozen=True)
class Items:
    """One task's items: names that are unique within the task, their scores, their gold probabilities."""

    names: list[str]
    values: list[float]
    gold: list[float | None]


# --- out of lm-eval's samples ---------------------------------------------------------------------


def right_answers(task, doc: dict) -> list[int]:
    """The indices of the right choices of a multiple-choice document, as lm-eval's metrics see them; [] if unknown."""
    if "mc2_targets" in doc and callable(task.config.process_results):  # TruthfulQA's mc2 has several right answers
        return [i for i, label in enumerate(doc["mc2_targets"]["labels"]) if label == 1]
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    found = [choices.index(g) if isinstance(g, str) and g in choices else g for g in _listed(gold)]
    return [g for g in found if isinstance(g, int) and 0 <= g < len(choices)]


def _listed(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def softmax_share(scores_of_choices: list[float], right: list[int]) -> float:
    """The share of softmax(scores) on `right`: ([0.0, log 3], [1]) -> 0.75. Float64, shifted by the largest."""
    top = max(scores_of_choices)
    parts = [math.exp(score - top) for score in scores_of_choices]
    return math.fsum(parts[i] for i in right) / math.fsum(parts)


def gold_probability(task, sample: dict, metric: str) -> float | None:
    """Probability of the right answer: softmax over what the metric compares, which for acc_norm is the log-likelihood
    divided by the choice's length in characters, for acc_bytes in bytes. None where there is nothing to choose from."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    doc, choices = sample["doc"], task.doc_to_choice(sample["doc"])
    right = right_answers(task, doc)
    if not right:
        return None
    likelihoods = [float(answer[0]) for answer in sample["filtered_resps"][: len(choices)]]
    name = metric.partition(",")[0]
    lengths = {"acc_norm": [len(c) for c in choices], "acc_bytes": [len(c.encode()) for c in choices]}
    compared = [ll / (n or 1) for ll, n in zip(likelihoods, lengths.get(name, [1] * len(choices)), strict=True)]
    return float(f"{softmax_share(compared, right):.9g}")


def items_of_task(task, samples: list[dict], metric: str) -> dict | None:
    """The record of one task; None where its score is not a mean over items (perplexities, F1)."""
    name, _, kind = metric.partition(",")
    samples = [sample for sample in samples if sample["filter"] == kind and name in sample]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])  # several processes hand them in by turns
    values = [sample[name] for sample in samples]
    if not values or not all(isinstance(value, (bool, int, float)) or hasattr(value, "item") for value in values):
        return None
    return {
        "doc": [sample["doc_hash"][:DOC_DIGITS] for sample in samples],
        "value": [_plain(value) for value in values],
        "gold": [gold_probability(task, sample, metric) for sample in samples],
    }


def _plain(value) -> int | float:
    """True, numpy's 1.0 -> 1; anything between stays a float, to the last bit."""
    number = float(value)
    return int(number) if number.is_integer() else number


def items_of_document(document: dict, tasks: dict) -> dict[str, dict]:
    """{leaf task: record} out of lm-eval's document with `samples`; `tasks` are lm-eval's task objects by name."""
    found = {}
    for leaf, metric in scores.leaf_metrics(document).items():
        record = items_of_task(tasks[leaf], document.get("samples", {}).get(leaf, []), metric)
        score = document["results"][leaf][metric]
        if record and math.isclose(math.fsum(record["value"]) / len(record["value"]), score, abs_tol=FITS):
            found[leaf] = record
    return found


# --- out of results files -------------------------------------------------------------------------


def unique_names(docs: list[str]) -> list[str]:
    """Data sets hold some questions twice; the second counts as another item: ["a", "b", "a"] -> ["a", "b", "a#2"]."""
    seen: dict[str, int] = {}
    names = []
    for doc in docs:
        seen[doc] = seen.get(doc, 0) + 1
        names.append(doc if seen[doc] == 1 else f"{doc}#{seen[doc]}")
    return names


def read_items(path: str, document: dict) -> dict[str, Items]:
    """A results file's items. DataError where they are not what this script writes, or do not fit the score."""
    recorded = document.get("items") or {}
    if not isinstance(recorded, dict):
        raise DataError(
            f"{path}: `items` is {type(recorded).__name__}, needed is a mapping of tasks; score the model again"
        )
    metrics = scores.leaf_metrics(document)
    return {leaf: _checked(path, leaf, record, document, metrics.get(leaf)) for leaf, record in recorded.items()}


def _checked(path: str, leaf: str, record: dict, document: dict, metric: str | None) -> Items:
    again = "it was changed, or put together from two; score the model again"
    lists = [record.get(key) for key in ("doc", "value", "gold")] if isinstance(record, dict) else [None]
    if not all(isinstance(found, list) for found in lists) or len({len(found) for found in lists}) != 1 or not lists[0]:
        raise DataError(f"{path}: the items of {leaf!r} are not three lists of one length (doc, value, gold); {again}")
    docs, values, gold = lists
    if not all(isinstance(doc, str) for doc in docs) or not all(scores.is_score(value) for value in values):
        raise DataError(f"{path}: the items of {leaf!r} hold something else than hashes and numbers; {again}")
    score, mean = document["results"].get(leaf, {}).get(metric), math.fsum(values) / len(values)
    if not scores.is_score(score) or not math.isclose(mean, score, abs_tol=FITS):
        shown = f"{score:.6f}" if scores.is_score(score) else "missing"
        raise DataError(f"{path}: the items of {leaf!r} have the mean {mean:.6f} but its score is {shown}; {again}")
    return Items(unique_names(docs), values, gold)


def is_plain_mean(task: str, values: list[list[float]], score: float) -> bool:
    """Whether a group's score is the mean of its tasks' means (MMLU's leaderboard figure, and what a group with
    `weight_by_size: false` asks for) and not that of all its items, which are given task by task."""
    if task in scores.PLAIN_MEAN_GROUPS or len(values) == 1:
        return True
    pooled = [value for of_task in values for value in of_task]
    return not math.isclose(math.fsum(pooled) / len(pooled), score, abs_tol=FITS)


def shared(first: Items, second: Items) -> tuple[list[float], list[float]]:
    """The scores of both on the items that both have, in the first one's order."""
    place = dict(zip(second.names, second.values, strict=True))
    pairs = [(value, place[name]) for name, value in zip(first.names, first.values, strict=True) if name in place]
    return [a for a, _ in pairs], [b for _, b in pairs]
