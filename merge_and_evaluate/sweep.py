"""Try several weights (the method's lambda), several recipes, or both: merge, score, choose, report.

Every candidate has a results file of its own, recognised by content, so an interrupted sweep resumes where it was. What
is tried is one of three: all candidates (here), a race among them (racing.py), a search (searching.py). Candidates are
scored in memory where that can be; of those that are written only the best so far stays on disk, and in a race each
until it drops out.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.shards.documents import read_json
from common.shards.hashing import text_hash
from common.shards.places import refuse_existing, refuse_existing_file
from merge_and_evaluate import merging, scoring
from merge_and_evaluate.candidates import (
    Candidate,
    Making,
    check_output,
    drop_model,
    model_to_score,
    put_in_place,
)
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.choosing import gold_average, value_of
from merge_and_evaluate.evaluation import eval_identity
from merge_and_evaluate.overview import write_overview
from merge_and_evaluate.results import MAX_RESULTS_BYTES, percent, write_results
from merge_and_evaluate.scoring import Scoring


@dataclass(frozen=True)
class Sweep:
    """What is tried, what decides (`by` score or gold), what is reported (None: what decides), and where the outcome
    goes.

    name: of the winner's row in tables; '' for its recipe's. candidates: of a search its start alone. way: what else
    decides the outcome, of a race or a search.
    """

    name: str
    candidates: tuple[Candidate, ...]
    choosing: Scoring
    reporting: Scoring | None
    save_path: Path
    output_path: Path
    by: str = "score"
    way: dict = field(default_factory=dict)

    @property
    def identity(self) -> str:
        deciding = [eval_identity(self.choosing.recipe, self.choosing.tasks, c.identity) for c in self.candidates]
        reported = eval_identity(self.reporting.recipe, self.reporting.tasks, "") if self.reporting else ""
        return text_hash(repr([deciding, reported, self.by, sorted(self.way.items())]))


@dataclass(frozen=True)
class Outcome:
    """What came of it. documents: {candidate: what it scored}, in the order tried; tried: a record of each, for the
    results file, with `facts` beside them; whole: whether the winner's document is lm-eval's own, on all of the
    choosing tasks; golds: the mean log-probability of the right answer and its standard error, where it decided."""

    winner: Candidate
    documents: dict[Candidate, dict]
    tried: list[dict]
    whole: bool = True
    facts: dict = field(default_factory=dict)
    golds: dict[Candidate, tuple[float, float | None]] = field(default_factory=dict)
    merges: int | None = None  # scored in this job, each on every item; of a race, which says itself what it took, None


# --- plan -----------------------------------------------------------------------------------------


def check_outputs(sweep: Sweep, candidates: tuple[Candidate, ...], overwrite: bool) -> None:
    """Refuse whatever lies under an output's name and is not this sweep's own, unless it may be replaced."""
    for candidate in candidates:
        check_output(candidate, sweep.choosing, overwrite)
    if not any(merging.already_merged(sweep.save_path, candidate.identity) for candidate in candidates):
        refuse_existing(sweep.save_path, overwrite)
    refuse_existing_file(sweep.output_path, overwrite)


def planned_files(output_path: Path, choices: list[Choice]) -> list[Path]:
    """Every results file, table and picture that a sweep over these choices writes, the outcome last."""
    stem = output_path.stem
    each = [output_path.with_name(f"{stem}_{choice.ending}.json") for choice in choices]
    return [*each, *(output_path.with_name(f"{stem}_sweep.{kind}") for kind in ("csv", "png")), output_path]


# --- one candidate --------------------------------------------------------------------------------


def score_candidate(sweep: Sweep, making: Making, candidate: Candidate, place: str) -> tuple[dict, bool]:
    """(its document, whether it was scored now); scores that are there from before are neither merged nor scored again,
    with --overwrite neither: it replaces what is not this sweep's. place: "3 of 6", for people."""
    document = scoring.finished(sweep.choosing, candidate.model(sweep.name), candidate.results_path)
    scored_now = not document
    if scored_now:
        model = model_to_score(making, candidate, sweep.name, sweep.save_path)
        document = scoring.score(sweep.choosing, model, candidate.results_path, **candidate.choice.record)
    average = percent(document["summary"]["average"], document["summary"]["average_stderr"])
    gold = f", gold {value_of(document, candidate.results_path, 'gold'):.4f} nats" if sweep.by == "gold" else ""
    before = "" if scored_now else ", from before"
    print(f"{candidate.choice.said} ({place}): average {average}{gold}, {candidate.results_path}{before}", flush=True)
    return document, scored_now


def record_of(candidate: Candidate, document: dict, value: float) -> dict:
    """What the results file says of a candidate that was tried."""
    summary = document["summary"]
    return {
        **candidate.choice.record,
        "average": summary["average"],
        "average_stderr": summary["average_stderr"],
        "value": value,
        "file": str(candidate.results_path),
    }


def try_all(sweep: Sweep, making: Making) -> Outcome:
    """Score every candidate; the best wins, the first of several equal ones. Of written models the best so far is
    kept."""
    documents, tried, best, best_value, merges = {}, [], None, -math.inf, 0
    for number, candidate in enumerate(sweep.candidates, 1):
        document, scored_now = score_candidate(sweep, making, candidate, f"{number} of {len(sweep.candidates)}")
        merges += scored_now
        value = value_of(document, candidate.results_path, sweep.by)
        documents[candidate] = document
        tried.append(record_of(candidate, document, value))
        worse = best if value > best_value else candidate
        if value > best_value:
            best, best_value = candidate, value
        if worse and not making.keep_models:
            drop_model(worse)
    return Outcome(best, documents, tried, golds=golds_of(sweep, documents), merges=merges)


def golds_of(sweep: Sweep, documents: dict[Candidate, dict]) -> dict[Candidate, tuple[float, float | None]]:
    """What decided, where that is the probability of the right answers; of documents with all their items."""
    if sweep.by != "gold":
        return {}
    return {candidate: gold_average(document, candidate.results_path) for candidate, document in documents.items()}


# --- run ------------------------------------------------------------------------------------------


def already_done(sweep: Sweep) -> bool:
    """Whether the results file is the outcome of this sweep, and a model is where its winner was put."""
    if not sweep.output_path.is_file() or not (sweep.save_path / merging.REPORT_NAME).is_file():
        return False
    document = read_json(sweep.output_path, most_bytes=MAX_RESULTS_BYTES)
    return ((document.get("summary") or {}).get("chosen") or {}).get("sweep") == sweep.identity


def chosen_record(sweep: Sweep, outcome: Outcome) -> dict:
    """What was chosen, on what, among what: goes into the results file."""
    return {
        **outcome.winner.choice.record,
        "on": sweep.choosing.tasks.names,
        "by": sweep.by,
        "held_out": sweep.reporting is not None,
        "candidates": outcome.tried,
        **sweep.way,
        **outcome.facts,
        "sweep": sweep.identity,
    }


def report_winner(sweep: Sweep, outcome: Outcome, overwrite: bool) -> None:
    """Write the results file of the chosen candidate: scored on what is reported, or taken from what decided."""
    record, winner = chosen_record(sweep, outcome), outcome.winner
    name = sweep.name or winner.merge.recipe.name
    if sweep.reporting or not outcome.whole:
        model = replace(winner.model(sweep.name), path=str(sweep.save_path), name=name)
        reporting = sweep.reporting or sweep.choosing
        said = {**winner.choice.record, "chosen": record}
        scoring.score_or_reuse(reporting, model, sweep.output_path, overwrite, **said)
        return
    document = outcome.documents[winner]
    summary = {**document["summary"], "name": name, "chosen": record}
    origin = {**document["provenance"], "model": str(sweep.save_path)}
    write_results(sweep.output_path, {**document, "summary": summary, "provenance": origin})


def one_log(sweep: Sweep) -> Sweep:
    """All of a sweep's scoring writes lm-eval's messages to one file, beside its results."""
    log = sweep.output_path.with_suffix(".log")
    reporting = replace(sweep.reporting, log=log) if sweep.reporting else None
    return replace(sweep, choosing=replace(sweep.choosing, log=log), reporting=reporting)


def conclude(sweep: Sweep, outcome: Outcome, making: Making, done: bool) -> None:
    """Put the winner's model in its place, report it unless that is done, leave table, CSV and picture."""
    replaced = done and not merging.already_merged(sweep.save_path, outcome.winner.identity)
    if replaced:  # by another merge since, as in a loop over recipes into one directory: the results are still right
        refuse_existing(sweep.save_path, making.overwrite)
    if replaced or not done:
        put_in_place(making, outcome.winner, sweep.save_path)
    if not done:
        report_winner(sweep, outcome, making.overwrite)
    scored = {candidate.choice: document for candidate, document in outcome.documents.items()}
    golds = {candidate.choice: gold for candidate, gold in outcome.golds.items()}
    write_overview(scored, outcome.winner.choice, sweep.output_path, golds)
    what = "mean log-probability of the right answer" if sweep.by == "gold" else "average"
    print(f"chosen: {outcome.winner.choice.said}, by the {what} of {', '.join(sweep.choosing.tasks.names)}")
    if not sweep.reporting and len(outcome.documents) > 1:
        print("These are the tasks it is reported on as well, which flatters it; --choose_on keeps them apart.")
    if done:
        print(f"{sweep.output_path} is from before" + (f"\nwrote {sweep.save_path}" if replaced else ""))
        return
    for path in (sweep.output_path, sweep.save_path):
        print(f"wrote {path}")
