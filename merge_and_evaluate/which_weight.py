"""Which weight is best, or which recipe: what the flags ask, planned and priced before anything is merged, then carried
out.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DataError
from common.shards.places import whole_path
from merge_and_evaluate import in_memory
from merge_and_evaluate.announcement import requests_to_make
from merge_and_evaluate.candidates import Making, candidate_of
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.merging import MergePlan, MergeSettings, input_digests
from merge_and_evaluate.race_plan import plan
from merge_and_evaluate.race_tasks import check_choice, check_race, loss_note, read_tasks, strata_of_tasks
from merge_and_evaluate.racing import Field, field_of, race, race_path
from merge_and_evaluate.recipes import with_weights
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


@dataclass(frozen=True)
class Question:
    """What the flags ask. weights: those to try with every recipe, all of them or, with `points`, in a race; none where
    each recipe keeps its own, and none of a search, which takes so many `evaluations`. by: score or gold; seed: of a
    race's items or a search's steps."""

    weights: tuple[tuple[float, ...], ...]
    by: str
    seed: int
    points: float | None = None
    evaluations: int | None = None
    layer_groups: int | None = None


@dataclass(frozen=True, eq=False)
class Planned:
    """A question that can be answered. choices: {choice: its merge}, of a search its start; requests: of scoring one
    candidate on every item, None where no data was read; written: of a race, how many candidates get a directory, which
    each keeps until it drops out; note: what to mind about the tasks."""

    question: Question
    choices: dict[Choice, MergePlan]
    searched: Searched | None = None
    field: Field | None = None
    requests: int | None = None
    written: int = 0
    note: str | None = None

    @property
    def candidates(self) -> int:
        """How many are tried, at most."""
        return self.question.evaluations or len(self.choices)

    @property
    def merges(self) -> int:
        """How often one is merged to be scored, at most: in a race once a round, unless it is written."""
        if not self.field:
            return self.candidates
        return (len(self.choices) - self.written) * self.field.plan.rounds + self.written

    @property
    def models_on_disk(self) -> int:
        """How many models are on disk at a time, at most: beside the one that is scored the best so far; in a race
        every written one, or the chosen one alone."""
        return max(self.written, 1) if self.field else min(self.candidates, 2)


# --- plan -----------------------------------------------------------------------------------------


def plan_choices(question: Question, merge_plans: list[MergePlan]) -> Planned:
    """The merges to try, from headers: of each recipe with each of the weights. Raises DataError for weights that a
    recipe has no place for, and for recipes that cannot be told apart by name."""
    if question.evaluations:
        (merge_plan,) = merge_plans
        searched = plan_search(merge_plan, question.evaluations, question.layer_groups, question.seed)
        start = (searched.search.start,) * searched.search.dimensions
        merge = replace(merge_plan, recipe=searched_recipe(searched, start))
        return Planned(question, {Choice(start): merge}, searched)
    several, choices = len(merge_plans) > 1, {}
    for merge_plan in merge_plans:
        name = merge_plan.recipe.name if several else ""
        for weights in question.weights or ((),):
            recipe = with_weights(merge_plan.recipe, weights) if weights else merge_plan.recipe
            choices[Choice(weights, name)] = replace(merge_plan, recipe=recipe)
    return Planned(question, choices)


def check_names(paths: list[str]) -> None:
    """DataError for two recipes of one name, which no table could tell apart."""
    names = [Path(path).stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        first = paths[names.index(name)]
        if first == path and paths.count(path) > 1:
            raise DataError(f"--recipe names {path} twice; name each recipe once")
        if first != path:
            raise DataError(f"--recipe: {first} and {path} would both be called {name!r} in tables; rename one")


def check_places_of_results(planned: Planned, save_path: Path, output_path: Path) -> None:
    """DataError where scores would be lost once they are there: within the directory that the winner's model replaces,
    or where a directory has the name of a table or the log."""
    # The folder's place, not the file's: a link of the file's name is replaced where it is.
    folder = Path(whole_path(output_path.parent))
    if Path(whole_path(save_path)) in (Path(whole_path(output_path)), folder, *folder.parents):
        raise DataError(
            f"{output_path}: inside {save_path}, which the chosen model replaces; write the results elsewhere"
        )
    for path in (*files_of(planned, output_path), output_path.with_suffix(".log")):
        if path.is_dir():
            raise DataError(f"{path}: a directory; move it away, or write elsewhere")


def priced(planned: Planned, choosing: Scoring, settings: MergeSettings, log: Path | None) -> Planned:
    """The same with its cost: the choosing tasks' data is read and refused where it cannot choose. log: for lm-eval's
    messages, None in a dry run. A sweep's dry run, which needs no data, reads none."""
    question = planned.question
    if log is None and question.points is None and not question.evaluations:
        return planned
    loaded = read_tasks(replace(choosing, log=log))
    metrics = check_choice(choosing.recipe, loaded, question.by)
    field, written = None, 0
    if question.points is not None:
        check_race(choosing.recipe, loaded, metrics)
        labels = [choice.label for choice in planned.choices]
        drawn = plan(strata_of_tasks(choosing.recipe, loaded), labels, question.points / 100, question.seed)
        field = field_of(drawn, question.seed, loaded, metrics, question.by)
        written = count_written(planned, choosing, settings)
    requests = requests_to_make(choosing.recipe, loaded)
    return replace(planned, field=field, requests=requests, written=written, note=loss_note(loaded, metrics))


def count_written(planned: Planned, choosing: Scoring, settings: MergeSettings) -> int:
    """How many of the candidates are written to be scored, as far as can be said before a model is loaded."""
    of_recipe = [merge.recipe.path for merge in planned.choices.values()]
    by_recipe = {merge.recipe.path: merge for merge in planned.choices.values()}
    written = (path for path, merge in by_recipe.items() if in_memory.written_reason(choosing.recipe, merge, settings))
    return sum(map(of_recipe.count, written))


def cost_line(planned: Planned) -> str:
    """What it may take, in one line: "at most 3 merges and 600 requests (200 for each of 3) to choose; then the chosen
    one is written and reported"."""
    requests = ""
    if planned.requests is not None:
        each, count = planned.requests, planned.candidates
        requests = f" and {count * each:,} requests ({each:,} for each of {count})"
    return f"at most {planned.merges} merges{requests} to choose; then the chosen one is written and reported"


def files_of(planned: Planned, output_path: Path) -> list[Path]:
    """The results files that are written; of a search, which finds its weights as it goes, not those of its trials."""
    races = planned.question.points is not None
    files = planned_files(output_path, [] if races or planned.searched else list(planned.choices))
    return [race_path(output_path), *files] if races else files


def print_memory(merge_plans: list[MergePlan], settings: MergeSettings, choosing: Scoring, keep_models: bool) -> None:
    """What --dry_run says of where candidates are while they are scored."""
    needed = []
    for merge_plan in merge_plans:
        reason = "--keep_models" if keep_models else in_memory.written_reason(choosing.recipe, merge_plan, settings)
        if reason:
            print(f"{merge_plan.recipe.path}: each candidate is written to a directory: {reason}")
        else:
            needed.append(in_memory.model_bytes(choosing.recipe, merge_plan.streamed(settings)))
    if needed:
        which = "others are merged into; of those" if len(needed) < len(merge_plans) else "candidates are merged into;"
        print(f"memory  {max(needed) / 1e9:8.3f} GB  more, for the model that {which} none is written")


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


def check_before_download(planned: Planned, sweep: Sweep, making: Making) -> None:
    """Refuse whatever is under an output's name while models are still on the Hub: it was made from other files than
    those.

    What is there already is told from a stranger's by hashes and times of the inputs, which are not here yet.
    """
    choices = planned.choices.items()
    candidates = (candidate_of(choice, merge, {}, making.settings, sweep.output_path) for choice, merge in choices)
    check_outputs(sweep, tuple(candidates), making.overwrite)


def on(planned: Planned, merge_plans: list[MergePlan]) -> Planned:
    """The same of the same merges, whose models have been downloaded in the meantime."""
    again = plan_choices(planned.question, merge_plans)
    return replace(planned, choices=again.choices, searched=again.searched)


def answer(planned: Planned, sweep: Sweep, making: Making) -> None:
    """Find the best candidate, put its model in its place, report it."""
    by_recipe = {merge.recipe.path: merge for merge in planned.choices.values()}
    digests = {path: input_digests(merge) for path, merge in by_recipe.items()}
    candidates = (
        candidate_of(choice, merge, digests[merge.recipe.path], making.settings, sweep.output_path)
        for choice, merge in planned.choices.items()
    )
    sweep = one_log(replace(sweep, candidates=tuple(candidates), by=planned.question.by, way=way(planned)))
    known = sweep.candidates
    if planned.searched:
        known = tried_before(sweep, planned.searched, making.settings)
    # A finished sweep's results are its own and not in its way. It is carried out all the same: for the table, and for
    # what was deleted since.
    if not (done := already_done(sweep)):
        check_outputs(sweep, known, making.overwrite)
    print(cost_line(planned) + (f"\n{planned.note}" if planned.note else ""), flush=True)
    began = time.monotonic()
    with in_memory.model_loader(sweep.choosing.recipe, making.settings, making.keep_models) as load:
        outcome = find(planned, sweep, replace(making, load=load))
    if outcome.merges is not None:
        took = f"{outcome.merges} merges and {outcome.merges * planned.requests:,} requests"
        print(f"choosing took {took} in this job, {time.monotonic() - began:.0f} s")
    conclude(sweep, outcome, making, done)
