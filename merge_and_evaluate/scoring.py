"""Score one model into one results file."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError, reason_of
from common.shards.checkpoint import Checkpoint
from common.shards.companions import has_tokenizer
from common.shards.documents import read_json
from common.shards.places import refuse_existing_file
from common.shards.processes import group
from merge_and_evaluate.card import add_scores
from merge_and_evaluate.eval_log import logged_to
from merge_and_evaluate.eval_machine import on_this_machine
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.eval_tasks import Tasks
from merge_and_evaluate.evaluation import eval_identity, evaluate
from merge_and_evaluate.in_memory import LoadedModel
from merge_and_evaluate.results import (
    MAX_RESULTS_BYTES,
    limit_of,
    print_results,
    provenance,
    summary_text,
    way_of_asking,
    with_summary,
    write_results,
    write_samples,
)
from merge_and_evaluate.scores import missing_scores

OF_A_CHOICE = ("chosen", "weights", "recipe")  # what a results file's summary says of how its model was chosen


@dataclass(frozen=True)
class Model:
    """A model to score: its directory, the name of its row in tables, a hash of what it is made of, and how it was
    made, for the results file (empty where that is not known). filled: a loaded model that holds its weights, where
    they are in memory alone."""

    path: str
    name: str
    identity: str
    origin: dict
    filled: LoadedModel | None = None

    @property
    def directory(self) -> str:
        """Where its config.json lies."""
        return str(self.filled.directory) if self.filled else self.path


@dataclass(frozen=True)
class Scoring:
    """What a model is scored on, and how."""

    recipe: EvalRecipe
    tasks: Tasks
    log: Path | None = None  # lm-eval's messages; None: beside the results file


def check_one_process(instead: str) -> None:
    """DataError under torchrun and `accelerate launch` with several processes, each of which would merge. instead: what
    to do."""
    if group().count > 1:
        raise DataError(f"several processes were started, and a merge needs one: {instead}")


def finished(scoring: Scoring, model: Model, path: Path) -> dict | None:
    """The document at `path`, if it holds the scores of this model on these tasks."""
    if not path.is_file():
        return None
    document = read_json(path, most_bytes=MAX_RESULTS_BYTES)
    identity = (document.get("provenance") or {}).get("identity")
    if identity != eval_identity(scoring.recipe, scoring.tasks, model.identity):
        return None
    return None if missing_scores(document["summary"]) else document


def _finished_anywhere(scoring: Scoring, model: Model, path: Path, identity: str) -> dict | None:
    """The same of a file that may be anybody's: one that cannot be read holds no scores, and stops nothing. identity:
    of the scores, without which the file is not parsed."""
    try:
        found = path.is_file() and identity.encode() in path.read_bytes()
        return finished(scoring, model, path) if found else None
    except (OSError, DataError):
        return None


def has_chat_template(directory: Path) -> bool:
    """Whether a model directory brings a chat template: a file of its own, or a key in tokenizer_config.json."""
    config = directory / "tokenizer_config.json"
    in_config = config.is_file() and bool(read_json(config).get("chat_template"))
    return in_config or any(directory.glob("chat_template*")) or any(directory.glob("additional_chat_templates/*"))


def check_chat_template(recipe: EvalRecipe, models: list[Checkpoint], made_by_recipe: bool = False) -> None:
    """DataError if apply_chat_template is set and the model that is scored would have no template: a merged model gets
    the tokenizer of the first of `models` that has one (the base), unless the merge recipe makes it."""
    if not recipe.config.get("apply_chat_template") or made_by_recipe or "tokenizer" in recipe.model_args:
        return
    donor = next((model for model in models if has_tokenizer(model.path)), models[0])
    if has_chat_template(donor.path):
        return
    having = [model for model in models if has_chat_template(model.path)]
    way = (
        f"{having[0].label} has one: copy its chat_template.jinja there, or set `chat_template: auto` in the merge "
        "recipe"
        if having
        else "leave apply_chat_template out, or copy a chat_template.jinja there"
    )
    raise DataError(
        f"{recipe.path}: apply_chat_template is set, but {donor.label}, whose tokenizer is used, has no chat "
        f"template; {way}"
    )


def check_tokenizer(recipe: EvalRecipe, models: list[Checkpoint]) -> None:
    """Without a tokenizer there is nothing to score with; better said before the merge than after it."""
    if "tokenizer" not in recipe.model_args and not any(has_tokenizer(model.path) for model in models):
        raise DataError(
            f"{models[0].label}: no tokenizer in it, scoring needs one; copy tokenizer.json and "
            "tokenizer_config.json there from where the model came from"
        )


def score(scoring: Scoring, model: Model, path: Path, **chosen) -> dict | None:
    """Score a model and write the results file. None in helper processes, which have no scores.

    `chosen` is added to the summary: which weight was chosen on what.
    """
    recipe, tasks = scoring.recipe, scoring.tasks
    with logged_to(scoring.log or path.with_suffix(".log")):
        document = evaluate(recipe, model.path, tasks, model.identity, filled=model.filled)
    if document is None:
        return None
    identity = eval_identity(recipe, tasks, model.identity)
    origin = provenance(model.path, identity, on_this_machine(recipe, model.directory), tasks.names, **model.origin)
    result = with_summary(document, model.name, origin)
    result["summary"].update(chosen)
    if recipe.config.get("log_samples"):
        for written in write_samples(path, document.get("samples", {})):
            print(f"wrote {written}")
    write_results(path, result)  # after the samples: where this file is, scoring is complete
    _put_into_card(model, result)
    return result


def _put_into_card(model: Model, document: dict) -> None:
    """Put the scores into the model's card, or say why not: they are complete without it."""
    table = summary_text(document["summary"], limit_of(document))
    try:
        add_scores(Path(model.path), way_of_asking(document), table)
    except (OSError, UnicodeDecodeError, DataError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        print(f"note: the scores are not in {Path(model.path) / 'README.md'}: {reason:.200}", flush=True)


def check_results(scoring: Scoring, model: Model, path: Path, overwrite: bool) -> None:
    """Refuse what lies at `path`, unless it may be replaced or holds this model's scores already, which are reused.
    Of `model` the identity is enough, so a merge can be asked about before it is carried out."""
    identity = eval_identity(scoring.recipe, scoring.tasks, model.identity)
    if not _finished_anywhere(scoring, model, path, identity):
        refuse_existing_file(path, overwrite)


def scored_before(scoring: Scoring, model: Model, path: Path) -> dict | None:
    """Scores of the same content by the same recipe, from `path` or another results file beside it; says so.

    Only a complete document counts. The row is this model's, by name and place; why another job had chosen it stays
    behind."""
    identity = eval_identity(scoring.recipe, scoring.tasks, model.identity)
    beside = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
    for place in dict.fromkeys([path, *beside]):
        document = _finished_anywhere(scoring, model, place, identity)
        if document:
            print(f"{model.path} was scored by this recipe before: its scores are taken from {place}", flush=True)
            summary = {key: value for key, value in document["summary"].items() if key not in OF_A_CHOICE}
            origin = {**document["provenance"], "model": model.path}
            return {**document, "summary": {**summary, "name": model.name}, "provenance": origin}
    return None


def score_or_reuse(scoring: Scoring, model: Model, path: Path, overwrite: bool, **chosen) -> None:
    """Score a model, or take the scores that the same content got before by the same recipe; --overwrite scores it
    again. `chosen` is added to the summary."""
    check_results(scoring, model, path, overwrite)
    before = None if overwrite else scored_before(scoring, model, path)
    if before is None:
        result = score(scoring, model, path, **chosen)
    elif not group().is_main:  # one process of `accelerate launch` writes
        return
    else:
        result = before
        result["summary"].update(chosen)
        write_results(path, result)
        _put_into_card(model, result)
    if result:
        print_results(result)
        print(f"wrote {path}")
