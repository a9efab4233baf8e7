"""Candidates: choices of weights, the merges they mean, and how each comes to be scored."""

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.shards.hashing import text_hash
from common.shards.places import refuse_existing, refuse_existing_file
from common.shards.staging import move
from merge_and_evaluate import in_memory, merging, scoring
from merge_and_evaluate.comparison import label
from merge_and_evaluate.in_memory import LoadedModel
from merge_and_evaluate.merging import MergePlan, MergeSettings
from merge_and_evaluate.recipes import Recipe
from merge_and_evaluate.scoring import Model, Scoring


@dataclass(frozen=True, eq=False)
class Candidate:
    """One choice of weights: the merge it means, and where its scores go."""

    weights: tuple[float, ...]
    merge: MergePlan
    identity: str
    results_path: Path
    origin: dict

    @property
    def label(self) -> str:
        """(0.6, 1.2) -> '0.6 / 1.2'."""
        return label(self.weights)

    def model(self, name: str) -> Model:
        """The model that the merge makes, as it is scored."""
        return Model(str(self.merge.save_path), f"{name} {self.label}", self.identity, self.origin)


@dataclass(frozen=True)
class Making:
    """What makes models of candidates: hashes of the inputs, settings, what may be kept and replaced. load() -> the loaded
    model that each is streamed into, or None where each is to have a directory."""

    digests: dict
    settings: MergeSettings
    keep_models: bool
    overwrite: bool
    load: Callable[[], LoadedModel | None] = lambda: None


# --- plan -----------------------------------------------------------------------------------------


def weight_choices(weights: list[float] | None, grids: list[list[float]] | None) -> list[tuple[float, ...]]:
    """([0.6, 0.9], None) -> [(0.6,), (0.9,)]; (None, [[1, 2], [3]]) -> [(1, 3), (2, 3)]; each once; none: []."""
    grids = [weights] if weights else grids
    return list(dict.fromkeys(itertools.product(*grids))) if grids else []


def ending(weights: tuple[float, ...]) -> str:
    """(0.6,) -> 'weight_0.6'; (0.6, 1.2) -> 'weights_0.6_1.2': what a candidate's directory and results file end in."""
    if len(weights) > 16:  # a file's name has 255 bytes at most
        return f"weights_{text_hash(repr(weights))[:16]}"
    return ("weight_" if len(weights) == 1 else "weights_") + "_".join(f"{weight:g}" for weight in weights)


def candidate_of(
    merge_plan: MergePlan,
    changed: tuple[tuple[float, ...], Recipe],
    digests: dict,
    settings: MergeSettings,
    output: Path,
) -> Candidate:
    """The candidate of `changed`: weights, and the recipe with them in it. Its files are named after merge and output."""
    weights, recipe = changed
    directory = merge_plan.save_path.with_name(f"{merge_plan.save_path.name}_{ending(weights)}")
    results = output.with_name(f"{output.stem}_{ending(weights)}.json")
    identity = merging.merge_identity(recipe, digests, settings)
    merge = replace(merge_plan, recipe=recipe, save_path=directory)
    return Candidate(weights, merge, identity, results, merging.origin(recipe, digests, settings))


def check_output(candidate: Candidate, choosing: Scoring, overwrite: bool) -> None:
    """Refuse whatever lies under the candidate's names and is not its own, unless it may be replaced."""
    if not scoring.finished(choosing, candidate.model(""), candidate.results_path):
        refuse_existing_file(candidate.results_path, overwrite)
    if not merging.already_merged(candidate.merge.save_path, candidate.identity):
        refuse_existing(candidate.merge.save_path, overwrite)


# --- make -----------------------------------------------------------------------------------------


def model_to_score(making: Making, candidate: Candidate, name: str, save_path: Path) -> Model:
    """The candidate's model: in memory, or in the directory where it was merged, now or before."""
    model = candidate.model(name)
    for place in (candidate.merge.save_path, save_path):
        if merging.already_merged(place, candidate.identity):
            return replace(model, path=str(place))
    if loaded := making.load():
        in_memory.fill(loaded, candidate.merge, making.settings, f"merge {candidate.label}")
        return replace(model, filled=loaded)
    merging.merge(candidate.merge, making.digests, making.settings, making.overwrite)
    return model


def put_in_place(making: Making, winner: Candidate, save_path: Path) -> None:
    """Write the winner's model to `save_path`, or move it there."""
    if merging.already_merged(save_path, winner.identity):
        return
    if merging.already_merged(winner.merge.save_path, winner.identity):
        move(winner.merge.save_path, save_path)
        return
    # What is there already was found to be another candidate of this very sweep, or may be replaced.
    overwrite = making.overwrite or (save_path / merging.REPORT_NAME).is_file()
    merging.merge(replace(winner.merge, save_path=save_path), making.digests, making.settings, overwrite)


def drop_model(candidate: Candidate) -> None:
    """Delete the candidate's directory, if it was written and is its own."""
    if merging.already_merged(candidate.merge.save_path, candidate.identity):
        shutil.rmtree(candidate.merge.save_path)
