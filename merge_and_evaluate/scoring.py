"""Score one model into one results file."""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from common.shards.checkpoint import Checkpoint
from common.shards.documents import read_json
from merge_and_evaluate.eval_log import logged_to
from merge_and_evaluate.eval_machine import on_this_machine
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_tasks import Tasks
from merge_and_evaluate.evaluation import eval_identity, evaluate
from merge_and_evaluate.results import print_results, provenance, with_summary, write_results, write_samples
from merge_and_evaluate.scores import missing_scores


@dataclass(frozen=True)
class Model:
    """A model to score: its directory, the name of its row in tables, a hash of what it is made of, and
    how it was made, for the results file (empty where that is not known)."""

    path: str
    name: str
    identity: str
    origin: dict


@dataclass(frozen=True)
class Scoring:
    """What a model is scored on, and how."""

    recipe: EvalRecipe
    tasks: Tasks
    log: Path | None = None  # lm-eval's messages; None: beside the results file


def check_one_process() -> None:
    """DataError under torchrun and `accelerate launch` with several processes, each of which would merge."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError(
            "several processes were started, and a merge needs one: merge with --merge_only, then score "
            "with `accelerate launch merge_and_evaluate_7b.py --eval_only …`"
        )


def finished(scoring: Scoring, model: Model, path: Path) -> dict | None:
    """The document at `path`, if it holds the scores of this very model on these very tasks."""
    if not path.is_file():
        return None
    document = read_json(path)
    identity = document.get("provenance", {}).get("identity")
    if identity != eval_identity(scoring.recipe, scoring.tasks, model.identity):
        return None
    return None if missing_scores(document["summary"]) else document


def check_tokenizer(recipe: EvalRecipe, models: list[Checkpoint]) -> None:
    """Without a tokenizer there is nothing to score with; better said before the merge than after it."""
    model_args = recipe.config.get("model_args") or {}
    if "tokenizer" not in model_args and not any(any(model.path.glob("tokenizer*")) for model in models):
        raise DataError(
            f"{models[0].label}: no tokenizer in it, scoring needs one; copy tokenizer.json and "
            "tokenizer_config.json there from where the model came from"
        )


def score(scoring: Scoring, model: Model, path: Path, **chosen) -> dict | None:
    """Score a model and write the results file. None in helper processes, which have no scores.

    `chosen` goes into the summary: which weight was chosen on what.
    """
    recipe, tasks = scoring.recipe, scoring.tasks
    with logged_to(scoring.log or path.with_suffix(".log")):
        document = evaluate(recipe, model.path, tasks, model.identity)
    if document is None:
        return None
    identity = eval_identity(recipe, tasks, model.identity)
    origin = provenance(model.path, identity, on_this_machine(recipe, model.path), tasks.names, **model.origin)
    result = with_summary(document, model.name, origin)
    result["summary"].update(chosen)
    if recipe.config.get("log_samples"):
        for written in write_samples(path, document.get("samples", {})):
            print(f"wrote {written}")
    write_results(path, result)
    return result


def score_and_show(scoring: Scoring, model: Model, path: Path, **chosen) -> None:
    """Score a model, write the results file, print its tables."""
    result = score(scoring, model, path, **chosen)
    if result:
        print_results(result)
        print(f"wrote {path}")
