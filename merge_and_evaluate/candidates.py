"""Candidates: the merges that choices mean, and how each comes to be scored."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.shards.places import refuse_existing, refuse_existing_file
from common.shards.staging import move
from merge_and_evaluate import in_memory, merging, scoring
from merge_and_evaluate.choices import Choice
from merge_and_evaluate.in_memory import LoadedModel
from merge_and_evaluate.merging import MergePlan, MergeSettings
from merge_and_evaluate.scoring import Model, Scoring


@dataclass(frozen=True, eq=False)
class Candidate:
    """One choice: the merge it means, hashes of what goes into it, and where its scores go."""

    choice: Choice
    merge: MergePlan
    digests: dict
    identity: str
    results_path: Path
    origin: dict

    @property
    def label(self) -> str:
        """'0.6 / 1.2', 'cabs 0.6'."""
        return self.choice.label

    def model(self, name: str) -> Model:
        """The model that the merge makes, as it is scored."""
        return Model(str(self.merge.save_path), f"{name} {self.label}".strip(), self.identity, self.origin)


@dataclass(frozen=True)
class Making:
    """What makes models of candidates: settings, what may be kept and replaced. load(merge) -> the loaded model that a
    merge is streamed into, or None where it is to have a directory."""

    settings: MergeSettings
    keep_models: bool
    overwrite: bool
    load: Callable[[MergePlan], LoadedModel | None] = lambda merge: None


# --- plan -----------------------------------------------------------------------------------------


def candidate_of(choice: Choice, merge: MergePlan, digests: dict, settings: MergeSettings, output: Path) -> Candidate:
    """The candidate of a choice whose merge is planned, its weights in the recipe. digests: of the merge's models. Its
    files are named after the merge's and `output`."""
    directory = merge.save_path.with_name(f"{merge.save_path.name}_{choice.ending}")
    results = output.with_name(f"{output.stem}_{choice.ending}.json")
    identity = merging.merge_identity(merge.recipe, digests, settings)
    made = merging.origin(merge.recipe, digests, settings)
    return Candidate(choice, replace(merge, save_path=directory), digests, identity, results, made)


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
    if loaded := making.load(candidate.merge):
        in_memory.fill(loaded, candidate.merge, making.settings, f"merge {candidate.label}")
        return replace(model, filled=loaded)
    merging.merge(candidate.merge, candidate.digests, making.settings, making.overwrite)
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
    merging.merge(replace(winner.merge, save_path=save_path), winner.digests, making.settings, overwrite)


def drop_model(candidate: Candidate) -> None:
    """Delete the candidate's directory, if it was written and is its own."""
    if merging.already_merged(candidate.merge.save_path, candidate.identity):
        shutil.rmtree(candidate.merge.save_path)
