"""A search for the weights: CMA-ES over λ (search.py), each generation merged and scored on the tasks that choose.

Every trial has a results file of its own. A search that was stopped resumes by replaying them: the same seed proposes
the same weights, and those that have their scores are not scored again.
"""

from dataclasses import dataclass, replace

from common.errors import DataError
from merge_and_evaluate import scoring
from merge_and_evaluate.candidates import Candidate, Making, candidate_of, check_output, drop_model
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.choosing import value_of
from merge_and_evaluate.merging import MergePlan, MergeSettings
from merge_and_evaluate.recipes import Recipe, weighted_entries, with_weights
from merge_and_evaluate.search import Search, Trial, Weights, best, per_layer, propose
from merge_and_evaluate.sweep import Outcome, Sweep, golds_of, record_of, score_candidate


@dataclass(frozen=True)
class Searched:
    """What is searched: the steps, the merge they change, λ per vector and group of layers (groups None: per
    vector)."""

    search: Search
    merge_plan: MergePlan
    vectors: int
    groups: int | None
    layers: int | None


def plan_search(merge_plan: MergePlan, evaluations: int, groups: int | None, seed: int) -> Searched:
    """A search over the recipe's weights, from headers. Raises DataError for a weight that is no number, and for more
    groups than layers."""
    vectors, layers = len(weighted_entries(merge_plan.recipe)), None
    if groups:
        layers = _layers(merge_plan)
        per_layer((1.0,) * (vectors * groups), vectors, groups, layers)
    return Searched(Search(vectors * (groups or 1), evaluations, seed), merge_plan, vectors, groups, layers)


def _layers(merge_plan: MergePlan) -> int:
    """The model's number of layers."""
    whole = merge_plan.checkpoints[0]
    for section in (whole.config, whole.config.get("text_config") or {}):
        if isinstance(section.get("num_hidden_layers"), int):
            return section["num_hidden_layers"]
    raise DataError(
        f"{whole.label}: config.json has no num_hidden_layers, so layers cannot be grouped; leave out --layer_groups"
    )


def searched_recipe(searched: Searched, weights: Weights) -> Recipe:
    """The recipe with weights in it: one for each vector, or for each vector one for every layer."""
    if not searched.groups:
        return with_weights(searched.merge_plan.recipe, weights)
    return with_weights(
        searched.merge_plan.recipe,
        tuple(map(list, per_layer(weights, searched.vectors, searched.groups, searched.layers))),
    )


def candidate_at(sweep: Sweep, searched: Searched, weights: Weights, settings: MergeSettings) -> Candidate:
    """The candidate that tries these weights, of the same models as the search's start."""
    merge = replace(searched.merge_plan, recipe=searched_recipe(searched, weights))
    return candidate_of(Choice(weights), merge, sweep.candidates[0].digests, settings, sweep.output_path)


def tried_before(sweep: Sweep, searched: Searched, settings: MergeSettings) -> tuple[Candidate, ...]:
    """The candidates whose scores are there from before, as this search comes to them; the next one last."""
    trials, found = [], []
    while weights := next(iter(propose(searched.search, trials).candidates), None):
        candidate = candidate_at(sweep, searched, weights, settings)
        found.append(candidate)
        document = scoring.finished(sweep.choosing, candidate.model(sweep.name), candidate.results_path)
        if not document:
            break
        trials.append(Trial(weights, value_of(document, candidate.results_path, sweep.by)))
    return tuple(found)


def search(sweep: Sweep, making: Making, searched: Searched) -> Outcome:
    """Try what the search proposes until it ends; the best of everything tried wins. Of written models the best is
    kept."""
    trials, documents, tried, kept, merges = [], {}, [], None, 0
    most = searched.search.evaluations
    while (proposal := propose(searched.search, trials)).candidates:
        for weights in proposal.candidates:
            candidate = candidate_at(sweep, searched, weights, making.settings)
            check_output(candidate, sweep.choosing, making.overwrite)
            document, scored_now = score_candidate(sweep, making, candidate, f"{len(trials) + 1} of at most {most}")
            merges += scored_now
            value = value_of(document, candidate.results_path, sweep.by)
            trials.append(Trial(weights, value))
            documents[candidate] = document
            tried.append(record_of(candidate, document, value) | {"generation": proposal.generation})
            # best() of all, not a comparison with the last: of equal values the one tried first stays.
            is_best = best(trials).weights == weights
            worse = kept if is_best else candidate
            kept = candidate if is_best else kept
            if worse and not making.keep_models:
                drop_model(worse)
    print(f"the search ends: {proposal.ended}; {len(trials)} merges tried")
    golds = golds_of(sweep, documents)
    return Outcome(kept, documents, tried, facts={"ended": proposal.ended}, golds=golds, merges=merges)


def way_of(searched: Searched) -> dict:
    """What decides a search beside its models and tasks, for the results file."""
    search_settings = {"method": "cma", "evaluations": searched.search.evaluations, "seed": searched.search.seed}
    return {"search": search_settings | {"layer_groups": searched.groups}}
