"""The figures that people compare, out of lm-eval's document.

For the tasks of the Open LLM Leaderboards v1 and v2 and of metabench their own metrics; for any other task accuracy,
else exact match, else the task's first metric. All scores are as lm-eval gives them (accuracies: 0 to 1).
"""

import math

LEADERBOARD_METRICS = {
    "arc_challenge": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "mmlu": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "winogrande": "acc,none",
    "gsm8k": "exact_match,strict-match",
    "metabench_arc": "acc_norm,none",
    "metabench_arc_secondary": "acc_norm,none",
    "metabench_hellaswag": "acc_norm,none",
    "metabench_hellaswag_secondary": "acc_norm,none",
    "metabench_gsm8k": "exact_match,strict-match",
    "metabench_gsm8k_secondary": "exact_match,strict-match",
    "leaderboard_ifeval": "prompt_level_strict_acc,none",
}
PREFERRED_METRICS = ("acc", "exact_match")
OPENED_GROUPS = ("leaderboard", "metabench", "metabench_secondary")  # of tasks that are no one score together
PLAIN_MEAN_GROUPS = ("mmlu",)  # the leaderboard averaged MMLU's 57 subjects without regard to their size


def main_metric(task: str, scores: dict) -> str | None:
    """The key of the one metric that counts: ("x", {"f1,none": .2, "acc,none": .3}) -> "acc,none"."""
    keys = [key for key, value in scores.items() if "," in key and "_stderr," not in key and is_score(value)]
    if LEADERBOARD_METRICS.get(task) in keys:
        return LEADERBOARD_METRICS[task]
    preferred = [key for name in PREFERRED_METRICS for key in keys if key.partition(",")[0] == name]
    return next(iter(preferred + keys), None)


def is_score(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def stderr_of(scores: dict, metric: str) -> float | None:
    """The standard error beside a metric; lm-eval may give "N/A"."""
    name, _, kind = metric.partition(",")
    value = scores.get(f"{name}_stderr,{kind}")
    return value if is_score(value) else None


def mean_stderr(stderrs: list[float | None]) -> float | None:
    """Standard error of the plain mean of independent scores: [0.3, 0.4] -> 0.25; None if one is unknown."""
    if not stderrs or None in stderrs:
        return None
    return math.sqrt(sum(stderr**2 for stderr in stderrs)) / len(stderrs)


def leaves_of(document: dict, name: str) -> list[str]:
    """The tasks under a group, or the task itself."""
    children = document.get("group_subtasks", {}).get(name)
    if not children:
        return [name]
    return [leaf for child in children for leaf in leaves_of(document, child)]


def entries_of(document: dict) -> list[str]:
    """The tasks and aggregated groups that count once each: groups without a score of their own are opened."""
    groups = document.get("group_subtasks", {})
    inner = {child for children in groups.values() for child in children}
    waiting, entries = [name for name in document["results"] if name not in inner], []
    while waiting:
        name = waiting.pop(0)
        scoreless = main_metric(name, document["results"].get(name, {})) is None
        if groups.get(name) and (scoreless or name in OPENED_GROUPS):
            waiting = list(groups[name]) + waiting
        else:
            entries.append(name)
    return entries


def leaf_metrics(document: dict) -> dict[str, str]:
    """{leaf task: the metric that counts in it}, which is its entry's where it has that: the subjects of a group count
    by what the group is summed up by."""
    found = {}
    for entry in entries_of(document):
        of_entry = main_metric(entry, document["results"].get(entry, {}))
        for leaf in leaves_of(document, entry):
            results = document["results"].get(leaf, {})
            metric = of_entry if of_entry in results else main_metric(leaf, results)
            if metric is not None:
                found[leaf] = metric
    return found


def plain_mean(document: dict, group: str, metric: str) -> dict:
    """The mean over a group's tasks, regardless of their sizes, beside lm-eval's own, which weights by size."""
    results, leaves = document["results"], leaves_of(document, group)
    values = [results[leaf][metric] for leaf in leaves]
    return {
        "value": sum(values) / len(values),
        "stderr": mean_stderr([stderr_of(results[leaf], metric) for leaf in leaves]),
        "subjects": len(leaves),
        "weighted_value": results[group][metric],
        "weighted_stderr": stderr_of(results[group], metric),
    }


def more_is_better(document: dict, name: str, metric: str) -> bool:
    """Whether more is better in a task or group. lm-eval gives groups their direction in the order it loads them, so a
    group of groups may have none: it has its tasks' where they agree."""
    directions, key = document.get("higher_is_better", {}), metric.partition(",")[0]
    own = directions.get(name, {}).get(key)
    if own is not None:
        return own
    return any(directions.get(leaf, {}).get(key) is not False for leaf in leaves_of(document, name))


def task_summary(document: dict, name: str) -> dict:
    """{metric, value, stderr, …} of one task or group. The value is None where lm-eval gave no number."""
    scores = document["results"].get(name, {})
    metric = main_metric(name, scores)
    if metric is None:
        return {"metric": None, "value": None, "stderr": None}
    summary = {"metric": metric, "value": scores[metric], "stderr": stderr_of(scores, metric)}
    if name in PLAIN_MEAN_GROUPS:
        summary.update(plain_mean(document, name, metric))
    leaves = leaves_of(document, name)
    shots = {document.get("n-shot", {}).get(leaf) for leaf in leaves}
    counts = [document.get("n-samples", {}).get(leaf, {}).get("effective") for leaf in leaves]
    summary["num_fewshot"] = shots.pop() if len(shots) == 1 else None
    summary["samples"] = sum(counts) if None not in counts else None
    summary["higher_is_better"] = more_is_better(document, name, metric)
    return summary


def summarize(document: dict) -> dict:
    """{tasks, average, average_stderr} of lm-eval's document."""
    tasks = {name: task_summary(document, name) for name in entries_of(document)}
    return {"tasks": tasks, **average_of(tasks)}


def average_of(tasks: dict[str, dict]) -> dict:
    """{average, average_stderr} of tasks' summaries; None if scores are missing or point both ways."""
    values = [task["value"] for task in tasks.values()]
    comparable = None not in values and len({task["higher_is_better"] for task in tasks.values()}) == 1
    return {
        "average": sum(values) / len(values) if comparable else None,
        "average_stderr": mean_stderr([task["stderr"] for task in tasks.values()]) if comparable else None,
    }


def missing_scores(summary: dict) -> list[str]:
    """The tasks without a number."""
    return [name for name, task in summary["tasks"].items() if task["value"] is None]
