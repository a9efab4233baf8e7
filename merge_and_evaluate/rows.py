"""Rows to compare: one results file each, its scores, its items, its settings."""

import math
from dataclasses import dataclass, field

from merge_and_evaluate.eval_machine import TRANSFORMERS
from merge_and_evaluate.items import Items, read_items
from merge_and_evaluate.results import limit_of, marked, read_results
from merge_and_evaluate.scores import leaves_of, mean_stderr

AVERAGE = "average"


@dataclass(frozen=True)
class Row:
    """One method: its name, its summary from a results file, its items by leaf task (empty in old files), the leaf
    tasks under each of its tasks, and the settings that decide whether two rows compare."""

    name: str
    summary: dict
    path: str = ""
    items: dict[str, Items] = field(default_factory=dict)
    leaves: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, str | None] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, dict]:
        return self.summary["tasks"]

    @property
    def label(self) -> str:
        """The name as tables show it: a row scored on a part of the items says so."""
        return marked(self.name, self.settings.get("limit")).replace("|", "\\|")


def settings_of(document: dict) -> dict:
    """{what: how} of a results file: what may differ between two rows besides the model. None where it is not known."""
    config, origin = document.get("config") or {}, document.get("provenance") or {}
    model_args = config.get("model_args", origin.get("model_args"))
    known = isinstance(model_args, dict)
    dtype = config.get("model_dtype") or (model_args.get("dtype") if known else None)
    others = {k: v for k, v in model_args.items() if k not in ("pretrained", "dtype")} if known else {}
    backend, device = config.get("model"), config.get("device") or origin.get("device")
    template = document.get("chat_template_sha")
    instruction = document.get("system_instruction_sha")
    # None and "none" differ: a file that does not say is not told apart from another, one without a template is.
    return {
        "limit": limit_of(document),
        "dtypes": str(dtype).removeprefix("torch.") if dtype else None,
        "backends": "hf" if backend in TRANSFORMERS else backend,
        "model_args": _listed(others) if known else None,
        "gen_kwargs": _listed(config["gen_kwargs"]) if "gen_kwargs" in config else None,
        "devices": str(device).partition(":")[0] if device else None,
        "chat templates": (template[:8] if template else "none") if "chat_template_sha" in document else None,
        "system instructions": (instruction[:8] if instruction else "none")
        if "system_instruction_sha" in document
        else None,
        "batch sizes": origin.get("batch_size", config.get("batch_size")),
        "lm_eval versions": (origin.get("versions") or {}).get("lm_eval") or document.get("lm_eval_version"),
    }


def _listed(settings: dict | str | None) -> str:
    """{"b": 1, "a": 2} -> "a=2,b=1"; nothing -> "none"."""
    if isinstance(settings, dict):
        settings = ",".join(f"{key}={settings[key]}" for key in sorted(settings))
    return settings or "none"


def row_of(document: dict, path: str = "", name: str | None = None) -> Row:
    """The row of one results document. DataError if its items do not fit its scores."""
    summary = document["summary"]
    leaves = {task: leaves_of(document, task) for task in summary["tasks"]}
    return Row(name or summary["name"], summary, path, read_items(path, document), leaves, settings_of(document))


def read_rows(paths: list[str]) -> list[Row]:
    """One row for each results file."""
    return [row_of(read_results(path), path) for path in paths]


# --- columns --------------------------------------------------------------------------------------


def columns(rows: list[Row]) -> list[str]:
    """Every task of any row, in the order of first appearance."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def common_tasks(rows: list[Row]) -> list[str]:
    return [task for task in columns(rows) if all(task in row.tasks for row in rows)]


def head(rows: list[Row], task: str) -> str:
    """A task's column head with what was asked: 'arc_challenge 25-shot, 1172 items'; '0/25-shot' where rows differ."""
    there = [row.tasks[task] for row in rows if task in row.tasks]
    shots = dict.fromkeys(found["num_fewshot"] for found in there if found.get("num_fewshot") is not None)
    items = dict.fromkeys(found["samples"] for found in there if found.get("samples") is not None)
    parts = [f"{'/'.join(map(str, shots))}-shot"] if shots else []
    parts += [f"{'/'.join(map(str, items))} items"] if items else []
    return f"{task} {', '.join(parts)}".strip()


def cell(row: Row, column: str, shared: list[str]) -> tuple[float | None, float | None]:
    """(score, standard error). The average is over the tasks that all rows have, so that it compares; there is none of
    tasks that point both ways."""
    if column != AVERAGE:
        task = row.tasks.get(column, {})
        return task.get("value"), task.get("stderr")
    if set(shared) == set(row.tasks):
        return row.summary["average"], row.summary["average_stderr"]
    values = [row.tasks[task]["value"] for task in shared]
    ways = {row.tasks[task].get("higher_is_better") is not False for task in shared}
    if not values or None in values or len(ways) > 1:
        return None, None
    return math.fsum(values) / len(values), mean_stderr([row.tasks[task]["stderr"] for task in shared])


def scale_of(rows: list[Row], column: str) -> int:
    """100 for a column of shares, which are shown in percent; 1 where a score goes beyond 1 (perplexities)."""
    looked_at = common_tasks(rows) if column == AVERAGE else [column]
    values = [row.tasks[name]["value"] for row in rows for name in looked_at if name in row.tasks]
    return 100 if all(0 <= value <= 1 for value in values if value is not None) else 1


def less_is_better(rows: list[Row], column: str, shared: list[str]) -> bool:
    """Whether a column's tasks say that the smaller score is the better one."""
    looked_at = shared if column == AVERAGE else [column]
    found = [row.tasks[task] for row in rows for task in looked_at if task in row.tasks]
    return any(task.get("higher_is_better") is False for task in found)


def best_value(rows: list[Row], column: str, shared: list[str]) -> float | None:
    """The best score of a column: the largest, or the smallest where the task says that less is better."""
    values = [value for row in rows if (value := cell(row, column, shared)[0]) is not None]
    return (min if less_is_better(rows, column, shared) else max)(values, default=None)
