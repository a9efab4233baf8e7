"""Try several weights (the method's lambda): merge, score, choose, report.

Every weight has a results file of its own, recognised by content, so an interrupted sweep resumes where it
was. Of the merged models only the best so far stays on disk.
"""

import itertools
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DataError
from common.shards.documents import read_json
from common.shards.hashing import text_hash
from common.shards.places import refuse_existing, refuse_existing_file
from common.shards.staging import move
from merge_and_evaluate import merging, scoring
from merge_and_evaluate.comparison import label
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_settings import children
from merge_and_evaluate.eval_tasks import Tasks, check_data_files, check_task_code, find_tasks
from merge_and_evaluate.evaluation import eval_identity
from merge_and_evaluate.merging import MergePlan, MergeSettings
from merge_and_evaluate.overview import write_overview
from merge_and_evaluate.recipes import Recipe
from merge_and_evaluate.results import percent, write_results
from merge_and_evaluate.scoring import Model, Scoring


@dataclass(frozen=True, eq=False)
class Candidate:
    """One choice of weights: the merge it means, and where its scores go."""

    weights: tuple[float, ...]
    merge: MergePlan
    identity: str
    results_path: Path
    origin: dict

    def model(self, name: str) -> Model:
        """The model that the merge makes, as it is scored."""
        return Model(str(self.merge.save_path), f"{name} {label(self.weights)}", self.identity, self.origin)


@dataclass(frozen=True)
class Sweep:
    """What is tried, what decides, what is reported (None: what decides), and where the outcome goes."""

    name: str
    candidates: tuple[Candidate, ...]
    choosing: Scoring
    reporting: Scoring | None
    save_path: Path
    output_path: Path

    @property
    def identity(self) -> str:
        deciding = [eval_identity(self.choosing.recipe, self.choosing.tasks, c.identity) for c in self.candidates]
        reported = self.reporting.tasks.names if self.reporting else []
        return text_hash(repr([deciding, reported]))


# --- plan -----------------------------------------------------------------------------------------


def weight_choices(weights: list[float] | None, grids: list[list[float]] | None) -> list[tuple[float, ...]]:
    """([0.6, 0.9], None) -> [(0.6,), (0.9,)]; (None, [[1, 2], [3]]) -> [(1, 3), (2, 3)]; each once; none: []."""
    grids = [weights] if weights else grids
    return list(dict.fromkeys(itertools.product(*grids))) if grids else []


def ending(weights: tuple[float, ...]) -> str:
    """(0.6,) -> 'weight_0.6'; (0.6, 1.2) -> 'weights_0.6_1.2': what a candidate's directory and results file end in."""
    return ("weight_" if len(weights) == 1 else "weights_") + "_".join(f"{weight:g}" for weight in weights)


def plan_candidates(
    merge_plan: MergePlan,
    trials: dict[tuple[float, ...], Recipe],
    digests: dict,
    settings: MergeSettings,
    output_path: Path,
) -> tuple[Candidate, ...]:
    """The merges that are tried: for each choice of weights the recipe with them in it."""
    candidates = []
    for weights, recipe in trials.items():
        directory = merge_plan.save_path.with_name(f"{merge_plan.save_path.name}_{ending(weights)}")
        results = output_path.with_name(f"{output_path.stem}_{ending(weights)}.json")
        identity = merging.merge_identity(recipe, digests, settings)
        merge = replace(merge_plan, recipe=recipe, save_path=directory)
        made = merging.origin(recipe, digests, settings)
        candidates.append(Candidate(weights, merge, identity, results, made))
    return tuple(candidates)


def _others(tasks: Tasks, names: list[str], chosen: set[str]) -> list[str]:
    """What is left of `names` without the tasks in `chosen`: a group that holds some of these is opened."""
    left = []
    for name in tasks.only(names).names:
        leaves = set(tasks.only([name]).leaves)
        if leaves.isdisjoint(chosen):
            left.append(name)
        elif not leaves <= chosen:
            left += _others(tasks, children(tasks.manager.task_index, name), chosen)
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
    report_on = report_on or _others(tasks, recipe.tasks, set(tasks.only(choose_on).leaves))
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


def check_outputs(sweep: Sweep, overwrite: bool) -> None:
    """Refuse whatever lies under an output's name and is not this sweep's own, unless it may be replaced."""
    for candidate in sweep.candidates:
        if not scoring.finished(sweep.choosing, candidate.model(sweep.name), candidate.results_path):
            refuse_existing_file(candidate.results_path, overwrite)
        if not merging.already_merged(candidate.merge.save_path, candidate.identity):
            refuse_existing(candidate.merge.save_path, overwrite)
    if not any(merging.already_merged(sweep.save_path, candidate.identity) for candidate in sweep.candidates):
        refuse_existing(sweep.save_path, overwrite)
    refuse_existing_file(sweep.output_path, overwrite)


# --- run ------------------------------------------------------------------------------------------


def merged_model(sweep: Sweep, candidate: Candidate, digests: dict, settings: MergeSettings, overwrite: bool) -> Path:
    """The directory that holds the candidate's model, merged now unless it is there from before."""
    for place in (candidate.merge.save_path, sweep.save_path):
        if merging.already_merged(place, candidate.identity):
            return place
    merging.merge(candidate.merge, digests, settings, overwrite)
    return candidate.merge.save_path


def average_to_choose_by(document: dict, path: Path) -> float:
    """The average, such that larger is better. Raises DataError where tasks have none in common."""
    summary = document["summary"]
    if summary["average"] is None:
        raise DataError(
            f"{path}: its tasks have no common average (some say that less is better), so no weight can be "
            "chosen by it; name tasks of one kind with --choose_on"
        )
    less_is_better = any(not task["higher_is_better"] for task in summary["tasks"].values())
    return -summary["average"] if less_is_better else summary["average"]


def score_candidates(sweep: Sweep, digests: dict, settings: MergeSettings, keep_models: bool, overwrite: bool) -> dict:
    """{candidate: document}; a candidate whose scores are there from before is neither merged nor scored."""
    documents, best, best_average = {}, None, -math.inf
    for number, candidate in enumerate(sweep.candidates, 1):
        model = candidate.model(sweep.name)
        document = scoring.finished(sweep.choosing, model, candidate.results_path)
        before = ", from before" if document else ""
        if not document:
            directory = merged_model(sweep, candidate, digests, settings, overwrite)
            document = scoring.score(
                sweep.choosing,
                replace(model, path=str(directory)),
                candidate.results_path,
                weights=candidate.weights,
            )
        documents[candidate] = document
        average = average_to_choose_by(document, candidate.results_path)
        print(
            f"weight {label(candidate.weights)} ({number} of {len(sweep.candidates)}): average "
            f"{percent(document['summary']['average'], document['summary']['average_stderr'])}, {candidate.results_path}{before}",
            flush=True,
        )
        worse = best if average > best_average else candidate
        if average > best_average:
            best, best_average = candidate, average
        if worse and not keep_models and merging.already_merged(worse.merge.save_path, worse.identity):
            shutil.rmtree(worse.merge.save_path)
    return documents


def choose(documents: dict) -> Candidate:
    """The candidate with the best average; the first of several equal ones."""
    return max(documents, key=lambda candidate: average_to_choose_by(documents[candidate], candidate.results_path))


def chosen_record(sweep: Sweep, documents: dict, winner: Candidate) -> dict:
    """What was chosen, on what, among what: goes into the results file."""
    tried = [
        {
            "weights": c.weights,
            "average": d["summary"]["average"],
            "average_stderr": d["summary"]["average_stderr"],
            "file": str(c.results_path),
        }
        for c, d in documents.items()
    ]
    return {
        "weights": winner.weights,
        "on": sweep.choosing.tasks.names,
        "held_out": sweep.reporting is not None,
        "candidates": tried,
        "sweep": sweep.identity,
    }


def already_done(sweep: Sweep) -> bool:
    """Whether the results file and the model are the outcome of this sweep."""
    if not sweep.output_path.is_file() or not (sweep.save_path / merging.REPORT_NAME).is_file():
        return False
    return read_json(sweep.output_path).get("summary", {}).get("chosen", {}).get("sweep") == sweep.identity


def report_winner(sweep: Sweep, winner: Candidate, documents: dict) -> None:
    """Write the results file of the chosen weight: scored on what is reported, or taken from what decided."""
    record = chosen_record(sweep, documents, winner)
    if sweep.reporting:
        model = replace(winner.model(sweep.name), path=str(sweep.save_path), name=sweep.name)
        scoring.score_and_show(sweep.reporting, model, sweep.output_path, weights=winner.weights, chosen=record)
        return
    document = documents[winner]
    summary = {**document["summary"], "name": sweep.name, "chosen": record}
    origin = {**document["provenance"], "model": str(sweep.save_path)}
    write_results(sweep.output_path, {**document, "summary": summary, "provenance": origin})


def one_log(sweep: Sweep) -> Sweep:
    """All of a sweep's scoring writes lm-eval's messages to one file, beside its results."""
    log = sweep.output_path.with_suffix(".log")
    reporting = replace(sweep.reporting, log=log) if sweep.reporting else None
    return replace(sweep, choosing=replace(sweep.choosing, log=log), reporting=reporting)


def planned_files(output_path: Path, weights: list[tuple[float, ...]]) -> list[Path]:
    """Every results file, table and picture that a sweep over these weights writes, the outcome last."""
    stem = output_path.stem
    each = [output_path.with_name(f"{stem}_{ending(choice)}.json") for choice in weights]
    return [*each, *(output_path.with_name(f"{stem}_sweep.{kind}") for kind in ("csv", "png")), output_path]


def run(sweep: Sweep, digests: dict, settings: MergeSettings, keep_models: bool, overwrite: bool) -> None:
    """Score all candidates, keep the best model, report it, and leave table, CSV and picture."""
    sweep = one_log(sweep)
    done = already_done(sweep)
    if not done:
        check_outputs(sweep, overwrite)
    documents = score_candidates(sweep, digests, settings, keep_models, overwrite)
    winner = choose(documents)
    if not done:
        directory = merged_model(sweep, winner, digests, settings, overwrite)
        if directory != sweep.save_path:
            move(directory, sweep.save_path)
        report_winner(sweep, winner, documents)
    scored = {candidate.weights: document for candidate, document in documents.items()}
    write_overview(scored, winner.weights, sweep.output_path)
    print(f"chosen: weight {label(winner.weights)}, by the average of {', '.join(sweep.choosing.tasks.names)}")
    if not sweep.reporting and len(documents) > 1:
        print("These are the tasks it is reported on as well, which flatters it; --choose_on keeps them apart.")
    for path in (sweep.output_path, sweep.save_path):
        print(f"wrote {path}")
