"""The Open LLM Leaderboard v2's own figures: raw and normalised, by its published rules.

A score is normalised from what guessing gets (1 of the choices) to 0 and from all right to 1; below guessing counts
as 0. BBH, MuSR and MATH are normalised subtask by subtask and then averaged; IFEval is the mean of its two strict
accuracies. Source: the leaderboard's documentation, "Scores Normalization".
"""

import math

BBH_CHOICES = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
MATH_PARTS = (
    "algebra",
    "counting_and_prob",
    "geometry",
    "intermediate_algebra",
    "num_theory",
    "prealgebra",
    "precalculus",
)
GROUPS = {  # group or task: (its metric, {scored part: choices to guess from; 0 for free answers})
    "leaderboard_bbh": ("acc_norm,none", {f"leaderboard_bbh_{name}": n for name, n in BBH_CHOICES.items()}),
    "leaderboard_gpqa": ("acc_norm,none", {"leaderboard_gpqa": 4}),
    "leaderboard_math_hard": ("exact_match,none", {f"leaderboard_math_{name}_hard": 0 for name in MATH_PARTS}),
    "leaderboard_mmlu_pro": ("acc,none", {"leaderboard_mmlu_pro": 10}),
    "leaderboard_musr": ("acc_norm,none", {f"leaderboard_musr_{name}": n for name, n in MUSR_CHOICES.items()}),
}
IFEVAL = "leaderboard_ifeval"
IFEVAL_METRICS = ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")


def normalized(score: float, choices: int) -> float:
    """Guessing to 0, all right to 1: (0.6, 4) -> 0.4667; (0.2, 4) -> 0; (0.6, 0), a free answer, -> 0.6."""
    floor = 1 / choices if choices else 0.0
    return max(0.0, (score - floor) / (1 - floor))


def leaderboard_v2(results: dict) -> dict | None:
    """{tasks: {name: {raw, normalized}}, raw_average, normalized_average} of lm-eval's `results`; None if one of the
    six is missing or has no number, since an average of fewer is not the leaderboard's."""
    try:
        tasks = {name: _group(results, name) for name in GROUPS}
        strict = math.fsum(results[IFEVAL][metric] for metric in IFEVAL_METRICS) / 2
    except (KeyError, TypeError):
        return None
    tasks[IFEVAL] = {"raw": strict, "normalized": strict}
    averages = {kind: math.fsum(task[kind] for task in tasks.values()) / len(tasks) for kind in ("raw", "normalized")}
    return {"tasks": tasks, "raw_average": averages["raw"], "normalized_average": averages["normalized"]}


def _group(results: dict, name: str) -> dict[str, float]:
    metric, parts = GROUPS[name]
    scores = [normalized(results[part][metric], choices) for part, choices in parts.items()]
    return {"raw": results[name][metric], "normalized": math.fsum(scores) / len(scores)}
