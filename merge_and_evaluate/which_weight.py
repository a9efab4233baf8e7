"""Which weight is best: what the flags ask, planned and priced before anything is merged, then carried out."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from merge_and_evaluate import in_memory
from merge_and_evaluate.announcement import requests_to_make
from merge_and_evaluate.candidates import Making, candidate_of
from merge_and_evaluate.comparison import label
from merge_and_evaluate.merging import MergePlan, MergeSettings
from merge_and_evaluate.race_plan import most
from merge_and_evaluate.race_tasks import check_choice, loss_note, read_tasks
from merge_and_evaluate.racing import Field, plan_race, race, race_path
from merge_and_evaluate.recipes import Recipe, with_weights
from merge_and_evaluate.scoring import Scoring
from merge_and_evaluate.searching import Searched, plan_search, search, searched_recipe, tried_before, way_of
from merge_and_evaluate.sweep import (
    Outcome,
    Sweep,
    already_done,
    check_outputs,
    conclude,
    one_log,
    planned_files,
    try_all,
)

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Question:
    """What the flags ask. choices: the weights to try, all of them or, with `points`, in a race; none of a search, which takes
    so many `evaluations`. by: score or gold; seed: of a race's items or a search's steps."""

    choices: tuple[Weights, ...]
    by: str
    seed: int
    points: float | None = None
    evaluations: int | None = None
    layer_groups: int | None = None


@dataclass(frozen=True, eq=False)
class Planned:
    """A question that can be answered. trials: {weights: recipe}, of a search its start; requests: of scoring one candidate on
    every item, None where no data was read; note: what to mind about the tasks."""

    question: Question
    trials: dict[Weights, Recipe]
    searched: Searched | None = None
    field: Field | None = None
    requests: int | None = None
    note: str | None = None

    @property
    def candidates(self) -> int:
        """How many weights are tried, at most."""
        return self.question.evaluations or len(self.trials)

    @property
    def merges(self) -> int:
        """How often one is merged to be scored, at most: in a race once a round."""
        return most(self.field.plan).scorings if self.field else self.candidates


# --- plan -----------------------------------------------------------------------------------------


def plan_trials(question: Question, merge_plan: MergePlan) -> Planned:
    """The recipes to try, from headers. Raises DataError for weights that the recipe has no place for."""
    if question.evaluations:
        searched = plan_search(merge_plan, question.evaluations, question.layer_groups, question.seed)
        start = (searched.search.start,) * searched.search.dimensions
        return Planned(question, {start: searched_recipe(searched, start)}, searched)
    return Planned(question, {weights: with_weights(merge_plan.recipe, weights) for weights in question.choices})


def priced(planned: Planned, choosing: Scoring, log: Path | None) -> Planned:
    """The same with its cost: the choosing tasks' data is read and refused where it cannot choose. log: for lm-eval's messages,
    None in a dry run. A sweep's dry run, which needs no data, reads none."""
    question = planned.question
    if log is None and question.points is None and not question.evaluations:
        return planned
    loaded = read_tasks(replace(choosing, log=log))
    metrics = check_choice(choosing.recipe, loaded, question.by)
    field = None
    if question.points is not None:
        labels = [label(weights) for weights in planned.trials]
        field = plan_race(choosing.recipe, loaded, labels, (question.points, question.by), question.seed)
    requests = requests_to_make(choosing.recipe, loaded)
    return replace(planned, field=field, requests=requests, note=loss_note(loaded, metrics))


def cost_line(planned: Planned) -> str:
    """What it may take, in one line: "at most 30 merges and 14,688 requests to choose, then the chosen one's …"."""
    requests = ""
    if planned.requests is not None:
        requests = f" and {planned.candidates * planned.requests:,} requests ({planned.requests:,} for each of {planned.candidates})"
    return f"at most {planned.merges} merges{requests} to choose; then the chosen one is written and reported"


def files_of(planned: Planned, output_path: Path) -> list[Path]:
    """The results files that are written; of a search, which finds its weights as it goes, not those of its trials."""
    files = planned_files(output_path, [] if planned.field or planned.searched else list(planned.trials))
    return [race_path(output_path), *files] if planned.field else files


def print_memory(merge_plan: MergePlan, settings: MergeSettings, choosing: Scoring, keep_models: bool) -> None:
    """What --dry_run says of where candidates are while they are scored."""
    reason = "--keep_models" if keep_models else in_memory.written_reason(choosing.recipe, merge_plan, settings)
    if reason:
        print(f"each candidate is written to a directory: {reason}")
    else:
        nbytes = in_memory.model_bytes(choosing.recipe, merge_plan.streamed(settings))
        print(f"memory  {nbytes / 1e9:8.3f} GB  more, for the model that candidates are merged into; none is written")


# --- carry out ------------------------------------------------------------------------------------


def way(planned: Planned) -> dict:
    """What decides the outcome beside models and tasks."""
    if planned.searched:
        return way_of(planned.searched)
    question = planned.question
    return {"race": {"points": question.points, "seed": question.seed}} if planned.field else {}


def find(planned: Planned, sweep: Sweep, making: Making) -> Outcome:
    """The best of the candidates, in the way that was asked for."""
    if planned.searched:
        return search(sweep, making, planned.searched)
    return race(sweep, making, planned.field) if planned.field else try_all(sweep, making)


def check_before_download(planned: Planned, merge_plan: MergePlan, sweep: Sweep, making: Making) -> None:
    """Refuse whatever is under an output's name while models are still on the Hub: it was made from other files than those.

    What is there already is told from a stranger's by hashes and times of the inputs, which are not here yet.
    """
    trials = planned.trials.items()
    candidates = (candidate_of(merge_plan, trial, {}, making.settings, sweep.output_path) for trial in trials)
    check_outputs(sweep, tuple(candidates), making.overwrite)


def on(planned: Planned, merge_plan: MergePlan) -> Planned:
    """The same of another plan of the merge, whose models have been downloaded."""
    if planned.searched is None:
        return planned
    return replace(planned, searched=replace(planned.searched, merge_plan=merge_plan))


def answer(planned: Planned, merge_plan: MergePlan, sweep: Sweep, making: Making) -> None:
    """Find the best weight, put its model in its place, report it."""
    trials = (
        candidate_of(merge_plan, trial, making.digests, making.settings, sweep.output_path)
        for trial in planned.trials.items()
    )
    sweep = one_log(replace(sweep, candidates=tuple(trials), by=planned.question.by, way=way(planned)))
    known = sweep.candidates
    if planned.searched:
        known = tried_before(sweep, planned.searched, making.digests, making.settings)
    if not (done := already_done(sweep)):
        check_outputs(sweep, known, making.overwrite)
    print(cost_line(planned) + (f"\n{planned.note}" if planned.note else ""), flush=True)
    began = time.monotonic()
    with in_memory.bench(sweep.choosing.recipe, merge_plan, making.settings, making.keep_models) as load:
        outcome = find(planned, sweep, replace(making, load=load))
    if outcome.merges is not None:
        took = f"{outcome.merges} merges and {outcome.merges * planned.requests:,} requests"
        print(f"choosing took {took} in this job, {time.monotonic() - began:.0f} s")
    conclude(sweep, outcome, making, done)
