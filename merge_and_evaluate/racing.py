"""A race among weights or recipes: score batch by batch, keep every item's value in one file, say who drops out and
why.

<results>_race.json holds what every candidate scored, item by item, and is written after each batch: a race that was
stopped resumes with the next one. What a candidate scored also counts for another race with the same seed over the same
tasks and documents, of other candidates or with another margin. With another seed it does not: lm-eval draws the
demonstrations in a prompt one item after another, so what precedes an item depends on the batch that it is in.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.shards.documents import read_json
from common.shards.hashing import text_hash
from common.shards.places import check_disk
from common.shards.staging import part_of, write_file
from merge_and_evaluate.announcement import shots_of
from merge_and_evaluate.candidates import Candidate, Making, drop_model, model_to_score
from merge_and_evaluate.choosing import gives_nan, log_golds, mean_log_gold
from merge_and_evaluate.eval_log import logged_to
from merge_and_evaluate.eval_machine import on_this_machine
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.evaluation import eval_identity
from merge_and_evaluate.in_memory import opened, written_reason
from merge_and_evaluate.merging import already_merged
from merge_and_evaluate.race import Step, next_step, outcome, unscored, why_dropped
from merge_and_evaluate.race_plan import Plan, most
from merge_and_evaluate.race_tasks import documents_hash, larger_is_better, score_items
from merge_and_evaluate.results import MAX_RESULTS_BYTES
from merge_and_evaluate.scores import average_of
from merge_and_evaluate.sweep import Outcome, Sweep

UNITS = {"score": "points", "gold": "hundredths of a nat"}  # a hundredth of what is raced on, by --choose_by


@dataclass(frozen=True, eq=False)
class Field:
    """What is raced on: the plan and the seed that drew it, lm-eval's tasks with their documents and a hash of those,
    the metric of each, and whether gold decides."""

    plan: Plan
    seed: int
    loaded: dict
    documents: dict[str, str]
    metrics: dict[str, str]
    by: str


def race_path(output_path: Path) -> Path:
    """Where what was scored is kept."""
    return output_path.with_name(f"{output_path.stem}_race.json")


def field_of(race_plan: Plan, seed: int, loaded: dict, metrics: dict[str, str], by: str) -> Field:
    """What is raced on, of a plan drawn by `seed` over lm-eval's loaded tasks; by: score or gold."""
    documents = {
        stratum.name: documents_hash(loaded["tasks"][stratum.name], stratum.items) for stratum in race_plan.strata
    }
    return Field(race_plan, seed, loaded, documents, metrics, by)


# --- what was scored ------------------------------------------------------------------------------


def read_scored(sweep: Sweep, field: Field, overwrite: bool) -> dict[str, dict]:
    """{candidate's label: {"identity", "documents": {leaf: hash}, "items": {leaf: {"number", "value", "gold"}}}} out of
    the race's file. Raises DataError for a file that is not a race's, or whose tally of a candidate is of other models,
    tasks, documents or settings, unless it may be replaced. What fits counts, with --overwrite too."""
    path = race_path(sweep.output_path)
    if not path.is_file():
        return {}
    found = read_json(path, most_bytes=MAX_RESULTS_BYTES).get("candidates")
    if not isinstance(found, dict):
        if overwrite:
            return {}
        raise DataError(f"{path}: already there, and not what a race scored; give --overwrite to replace it")
    for candidate in sweep.candidates:
        tally = found.get(candidate.label, {})
        if tally and (other := _other_than(tally, sweep, field, candidate)):
            if not overwrite:
                raise DataError(
                    f"{path}: {candidate.choice.said} was scored there with other {other}; give --overwrite to score "
                    "it again, or another --output_path"
                )
            del found[candidate.label]
    return found


def _other_than(tally: dict, sweep: Sweep, field: Field, candidate: Candidate) -> str:
    """What a tally differs in from what this race would record; "" if it counts here."""
    new = _new_tally(sweep, field, candidate)
    if tally.get("identity") != new["identity"]:
        return "models, tasks or settings"
    # Items are kept by number: of a data set that was changed since, the same numbers are other questions.
    changed = [leaf for leaf, of_leaf in new["documents"].items() if tally.get("documents", {}).get(leaf) != of_leaf]
    return f"documents in {', '.join(changed)}" if changed else ""


def _new_tally(sweep: Sweep, field: Field, candidate: Candidate) -> dict:
    """A candidate's tally before its first item."""
    scored_as = eval_identity(sweep.choosing.recipe, sweep.choosing.tasks, candidate.identity)
    # The seed decides which items share a batch, and so what precedes each in its prompt: see the top of this file.
    return {"identity": text_hash(f"{scored_as} {field.seed}"), "documents": field.documents, "items": {}}


def add_scored(tally: dict, samples: dict[str, list[int]], found: dict[str, dict]) -> None:
    """Put a batch into a candidate's tally, item by item in the order in which they were scored."""
    for leaf, numbers in samples.items():
        kept = tally["items"].setdefault(leaf, {"number": [], "value": [], "gold": []})
        kept["number"] += numbers
        for key in ("value", "gold"):
            kept[key] += found[leaf][key]


def deciding(field: Field, leaf: str, record: dict, path: Path, said: str) -> list[float]:
    """What decides of a record's items, larger is better. Raises DataError for NaN, which would read as "not scored
    yet" and be asked for for ever; path and said, the candidate's name: for the error."""
    if field.by == "gold":
        return log_golds(record["gold"], path, leaf, said)
    if any(map(math.isnan, record["value"])):
        raise gives_nan(path, leaf, said)
    sign = 1 if larger_is_better(field.loaded, leaf, field.metrics[leaf]) else -1
    return [sign * value for value in record["value"]]


def values_of(field: Field, tally: dict, path: Path, said: str) -> dict[str, np.ndarray]:
    """What decides, item by item: {leaf: float64 (items,), larger is better, NaN = not scored}."""
    values = unscored(field.plan)
    for leaf, kept in tally.get("items", {}).items():
        if leaf in values:
            values[leaf][kept["number"]] = deciding(field, leaf, kept, path, said)
    return values


def drawn_items(field: Field, step: Step, tallies: dict[str, dict]) -> dict[str, dict]:
    """{candidate's label: {leaf: {"number", "value", "gold"}}} of the items that this race drew, up to the round in
    which the candidate dropped out or won: what an earlier race scored beside them is none of its outcome."""
    last, found = {drop.candidate: drop.round for drop in step.dropped}, {}
    for label in field.plan.candidates:
        drawn = zip(field.plan.strata, field.plan.sample(last.get(label, step.round)), strict=True)
        found[label] = {
            stratum.name: _only(tallies[label]["items"][stratum.name], numbers) for stratum, numbers in drawn
        }
    return found


def _only(kept: dict[str, list], numbers: np.ndarray) -> dict[str, list]:
    """The items of these numbers."""
    wanted = set(numbers.tolist())
    at = [place for place, number in enumerate(kept["number"]) if number in wanted]
    return {key: [values[place] for place in at] for key, values in kept.items()}


def count_of(items: Mapping[str, dict]) -> int:
    """How many items {leaf: record} are."""
    return sum(len(kept["number"]) for kept in items.values())


# --- the race -------------------------------------------------------------------------------------


def race(sweep: Sweep, making: Making, field: Field) -> Outcome:
    """Race until one is left, saying who drops out; what it took is said at the end."""
    path, began = race_path(sweep.output_path), time.monotonic()
    tallies, merges, requests = read_scored(sweep, field, making.overwrite), 0, 0
    candidates, told_of = {candidate.label: candidate for candidate in sweep.candidates}, set()
    # Each turn decides anew from everything that is scored, and carries nothing over: so a race that was stopped
    # anywhere resumes by the same steps.
    while True:
        scored = {
            label: values_of(field, tallies.get(label, {}), path, candidate.choice.said)
            for label, candidate in candidates.items()
        }
        step = next_step(field.plan, scored)
        for drop in step.dropped:
            if drop.candidate not in told_of:
                print(why_dropped(field.plan, drop, UNITS[field.by]), flush=True)
                told_of.add(drop.candidate)
                drop_model(candidates[drop.candidate])
        if not step.to_score:
            break
        if not merges:
            check_room(sweep, making, [candidates[label] for label in step.to_score])
        for label, wanted in step.to_score.items():
            samples = {leaf: numbers.tolist() for leaf, numbers in wanted.items()}
            merges += not is_made(sweep, candidates[label])
            found, asked = _score(sweep, making, candidates[label], field, samples, step)
            requests += asked
            for leaf, record in found.items():  # before it is written: what is in the file is never scored again
                deciding(field, leaf, record, path, candidates[label].choice.said)
            tally = tallies.setdefault(label, _new_tally(sweep, field, candidates[label]))
            add_scored(tally, samples, found)
            # After every batch: what a kill may cost is one candidate's round. In one line, since a line for each
            # number would double what is written so often.
            write_file(path, json.dumps({"tasks": sweep.choosing.tasks.names, "candidates": tallies}).encode())
    print(outcome(field.plan, step, UNITS[field.by]))
    drawn = drawn_items(field, step, tallies)
    print(spent_line(field.plan, drawn, merges, requests, time.monotonic() - began), flush=True)
    return outcome_of(sweep, field, step, drawn)


def is_made(sweep: Sweep, candidate: Candidate) -> bool:
    """Whether the candidate's model is in a directory already, so that no round merges it."""
    places = (candidate.merge.save_path, sweep.save_path)
    return any(already_merged(place, candidate.identity) for place in places)


def check_room(sweep: Sweep, making: Making, candidates: list[Candidate]) -> None:
    """Refuse unless there is room for every candidate that is to be written: each stays until it drops out."""
    reasons = {
        path: written_reason(sweep.choosing.recipe, merge, making.settings)
        for path, merge in {candidate.merge.recipe.path: candidate.merge for candidate in candidates}.items()
    }
    written = [candidate for candidate in candidates if reasons[candidate.merge.recipe.path]]
    check_disk({c.merge.save_path: _left_to_write(c) for c in written if not is_made(sweep, c)})


def _left_to_write(candidate: Candidate) -> int:
    """Bytes: a streamed merge that was stopped resumes with the shards it has; mergekit starts afresh."""
    merge = candidate.merge
    part = part_of(merge.save_path)
    there = 0 if merge.reason else sum(file.stat().st_size for file in part.glob("*.safetensors"))
    return max(0, merge.nbytes - there)


def _score(sweep: Sweep, making: Making, candidate: Candidate, field: Field, samples: dict, step: Step):
    """({leaf: record}, requests) of one candidate on one batch."""
    requests = {stratum.name: stratum.requests for stratum in field.plan.strata}
    asked = sum(requests[leaf] * len(numbers) for leaf, numbers in samples.items())
    items = sum(map(len, samples.values()))
    print(
        f"round {step.round + 1} of {field.plan.rounds}, {candidate.choice.said}: {items:,} items, {asked:,} requests",
        flush=True,
    )
    model = model_to_score(making, candidate, sweep.name, sweep.save_path)
    recipe = on_this_machine(sweep.choosing.recipe, model.directory)
    with logged_to(sweep.choosing.log), opened(recipe, model.filled, model.path) as lm:
        return score_items(lm, recipe, field.loaded, field.metrics, samples), asked


# --- what came of it ------------------------------------------------------------------------------


def spent_line(race_plan: Plan, drawn: Mapping[str, dict], merges: int, requests: int, seconds: float) -> str:
    """What the race took, beside scoring every candidate on every item."""
    every = most(race_plan)
    items = sum(map(count_of, drawn.values()))
    return (
        f"the race took {items:,} of {every.items:,} items ({items / every.items:.0%}): {merges} merges and "
        f"{requests:,} requests in this job, {seconds:.0f} s"
    )


def _mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def summary_of(field: Field, items: Mapping[str, dict], recipe: EvalRecipe) -> dict:
    """A results file's `summary` over a candidate's items {leaf: record}: entries as in the race, the metric's own
    values."""
    tasks: dict[str, dict] = {}
    entries = list(dict.fromkeys(stratum.entry for stratum in field.plan.strata))
    for entry in entries:
        strata = [stratum for stratum in field.plan.strata if stratum.entry == entry]
        parts = [_mean_and_stderr(items[stratum.name]["value"]) for stratum in strata]
        shares = [stratum.weight * len(entries) for stratum in strata]  # weights add up to 1 over all entries
        known = None not in [stderr for _, stderr in parts]
        shots = {shots_of(recipe, field.loaded["tasks"][stratum.name]) for stratum in strata}
        tasks[entry] = {
            "metric": field.metrics[strata[0].name],
            "value": math.fsum(share * mean for share, (mean, _) in zip(shares, parts, strict=True)),
            "stderr": math.sqrt(math.fsum((s * e) ** 2 for s, (_, e) in zip(shares, parts, strict=True)))
            if known
            else None,
            "samples": sum(len(items[stratum.name]["value"]) for stratum in strata),
            "num_fewshot": shots.pop() if len(shots) == 1 else None,
            "higher_is_better": larger_is_better(field.loaded, strata[0].name, field.metrics[strata[0].name]),
        }
    return {"tasks": tasks, **average_of(tasks)}


def outcome_of(sweep: Sweep, field: Field, step: Step, drawn: Mapping[str, dict]) -> Outcome:
    """The winner, and of every candidate what it scored on the items that were drawn for it."""
    drops = {drop.candidate: drop for drop in step.dropped}
    documents, tried, golds, recipe = {}, [], {}, sweep.choosing.recipe
    config = {"limit": recipe.config.get("limit")}  # so that the table and the CSV say it, as they do of a sweep
    for candidate in sweep.candidates:
        items = drawn[candidate.label]
        summary = summary_of(field, items, recipe)
        documents[candidate] = {"summary": {"name": candidate.label, **summary}, "results": {}, "config": config}
        if field.by == "gold":
            weights = {stratum.name: stratum.weight for stratum in field.plan.strata}
            golds[candidate] = mean_log_gold(weights, items, race_path(sweep.output_path))
        drop = drops.get(candidate.label)
        record = {**candidate.choice.record, **{key: summary[key] for key in ("average", "average_stderr")}}
        record["items"] = count_of(items)
        if drop:
            record["dropped"] = {
                "after_round": drop.round + 1,
                "behind": drop.leader,
                "difference": drop.difference,
                "stderr": drop.stderr_new,
                "at_most_better_by": drop.bound,
                "worse": drop.worse,
            }
        tried.append(record)
    winner = next(candidate for candidate in sweep.candidates if candidate.label == step.leader)
    facts = {"cannot_be_told_apart": list(step.undecided), "items": sum(t["items"] for t in tried)}
    facts["items_of_all"] = most(field.plan).items
    return Outcome(winner, documents, tried, whole=False, facts=facts, golds=golds)
