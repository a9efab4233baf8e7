"""Results files: put together, write, read, print.

A results file is lm-eval's own document, so `lm_eval.utils.make_table` reads it, plus `summary` (what
people compare), `provenance` (what was scored, and how) and `items` (every question's score; see items.py).
"""

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import DataError
from common.shards.documents import read_json, write_json
from common.shards.staging import write_file
from merge_and_evaluate import scores
from merge_and_evaluate.eval_machine import device_of
from merge_and_evaluate.eval_recipes import EvalRecipe
from merge_and_evaluate.leaderboard_v2 import leaderboard_v2

# A results file has about 90 bytes an item, a race's file 25 an item and candidate: room for millions of either. Python
# takes some ten times as much to read it.
MAX_RESULTS_BYTES = 500_000_000

PACKAGES = ("lm_eval", "mergekit", "transformers", "torch", "datasets")


def provenance(model: str, identity: str, eval_recipe: EvalRecipe, tasks: list[str], **merge) -> dict:
    """How a score came about: enough to tell whether two scores may be compared, and to make one again."""
    return {
        "identity": identity,
        "model": model,
        **merge,
        "eval_recipe_path": eval_recipe.path,
        "eval_recipe": eval_recipe.text,
        "tasks": tasks,
        "batch_size": eval_recipe.config.get("batch_size", 1),
        "device": device_of(eval_recipe),
        "limit": eval_recipe.config.get("limit"),
        "model_args": eval_recipe.model_args,
        "command": sys.argv,
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    """None for a package that is not installed: what streams needs no mergekit, and hours of scoring no version."""
    found = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def with_summary(document: dict, name: str, origin: dict) -> dict:
    """lm-eval's document with `summary` and `provenance`; its samples, if any, are left to write_samples."""
    document = {key: value for key, value in document.items() if key != "samples"}
    summary = {"name": name, **scores.summarize(document)}
    board = leaderboard_v2(document["results"])
    if board:
        summary["leaderboard_v2"] = board
    return {**document, "summary": summary, "provenance": origin}


def write_results(path: Path, document: dict) -> None:
    """Write exactly `path`, completely or not at all; DataError if a task has no number in it."""
    from lm_eval.utils import handle_non_serializable

    write_json(path, document, handle_non_serializable)
    for task in scores.missing_scores(document["summary"]):
        raise DataError(f"{path}: lm-eval gave no number for task {task!r}; look at its `results` there")


def write_samples(path: Path, samples: dict) -> list[Path]:
    """One JSON line per question and task, beside the results file (for `log_samples: true`)."""
    import json

    from lm_eval.utils import handle_non_serializable

    written = []
    for task, lines in samples.items():
        written.append(path.with_name(f"{path.stem}_samples_{task.replace('/', '_')}.jsonl"))
        text = "".join(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n" for line in lines)
        write_file(written[-1], text.encode())
    return written


def read_results(path: str) -> dict:
    """A results file of this script, or one that `lm_eval run` wrote, which gets its summary here."""
    try:
        document = read_json(Path(path), most_bytes=MAX_RESULTS_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such results file; --output_path of an earlier run is one") from None
    if not isinstance(document.get("results"), dict):
        raise DataError(f"{path}: has no `results`; needed is a file that merge_and_evaluate_7b.py or lm_eval wrote")
    try:
        document = document if "summary" in document else with_summary(document, Path(path).stem, {})
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: its `results` are not as lm_eval writes them; score the model again") from None
    if not _is_summary(document["summary"]):
        raise DataError(f"{path}: its `summary` is not as this script writes it; score the model again")
    return document


def _is_summary(summary) -> bool:
    """Whether this is what with_summary makes, as far as tables need it."""
    if not isinstance(summary, dict) or not {"name", "tasks", "average", "average_stderr"} <= summary.keys():
        return False
    tasks = summary["tasks"].values() if isinstance(summary["tasks"], dict) else [None]
    return all(isinstance(task, dict) and {"metric", "value", "stderr"} <= task.keys() for task in tasks)


def percent(value: float | None, stderr: float | None = None, scale: int | None = None) -> str:
    """(0.7292, 0.013) -> '72.92 ± 1.30'; a missing value is '–'. Scores above 1 (perplexities) stay as they are. scale:
    of a column, whose scores are shown alike; None where a score stands alone."""
    if value is None:
        return "–"
    if scale is None:
        scale = 100 if 0 <= value <= 1 else 1
    return f"{value * scale:.2f}" + (f" ± {stderr * scale:.2f}" if stderr is not None else "")


def marked(name: str, limit) -> str:
    """("TA", 100) -> 'TA (limit 100)'; ("TA", None) -> 'TA': a row scored on a part of the items says so in every
    table.
    """
    return f"{name} ({part_text(limit)})" if isinstance(limit, (int, float, str)) else name


def part_text(limit: float | str) -> str:
    """What limit_of() gives, in words: 100 -> 'limit 100', 'samples' -> 'samples'."""
    return limit if isinstance(limit, str) else f"limit {limit:g}"


def limit_of(document: dict):
    """The `limit` that a document was scored with; "samples" where its recipe named some of the items; None for all."""
    limit = (document.get("config") or {}).get("limit")
    limit = limit if limit is not None else (document.get("provenance") or {}).get("limit")
    counts = (document.get("n-samples") or {}).values()
    return "samples" if limit is None and any(c.get("effective", 0) < c.get("original", 0) for c in counts) else limit


def way_of_asking(document: dict) -> str:
    """What tells scores of the same model apart: 'arc_challenge, mmlu (25/5-shot, limit 20)'."""
    found = [task.get("num_fewshot") for task in document["summary"]["tasks"].values()]
    shots = dict.fromkeys(str(count) for count in found if count is not None)
    how = [f"{'/'.join(shots)}-shot"] if shots else []
    limit = limit_of(document)
    how += [] if limit is None else [part_text(limit)]
    how += ["chat template"] if document.get("chat_template_sha") else []
    return ", ".join(document["provenance"]["tasks"]) + (f" ({', '.join(how)})" if how else "")


def summary_text(summary: dict, limit=None) -> str:
    """The summary as a Markdown table: task, metric, shots, items, score."""
    lines = [f"| {marked(summary['name'], limit)} | metric | shots | items | score |", "|---|---|---|---|---|"]
    for name, task in summary["tasks"].items():
        shots, items = ("–" if task.get(key) is None else task[key] for key in ("num_fewshot", "samples"))
        lines.append(f"| {name} | {task['metric']} | {shots} | {items} | {percent(task['value'], task['stderr'])} |")
        if "weighted_value" in task:
            score = percent(task["weighted_value"], task["weighted_stderr"])
            lines.append(f"| {name}, weighted by subject size | {task['metric']} | {shots} | {items} | {score} |")
    lines.append(f"| average | | | | {percent(summary['average'], summary['average_stderr'])} |")
    board = summary.get("leaderboard_v2", {})
    for kind in ("raw", "normalized") if board else ():
        lines.append(f"| leaderboard's {kind} average | | | | {percent(board[f'{kind}_average'])} |")
    return "\n".join(lines)


def print_results(document: dict) -> None:
    """lm-eval's own tables, then the summary."""
    from lm_eval.utils import make_table

    print(make_table(document))
    if "groups" in document:
        print(make_table(document, "groups"))
    print(summary_text(document["summary"], limit_of(document)))
