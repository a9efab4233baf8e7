"""The model card: README.md beside a merged model, with front matter as the Hugging Face Hub reads it."""

import re
import shlex
import sys
from pathlib import Path

from common.shards.documents import read_json
from common.shards.staging import write_file
from common.shards.verify import MERGE_REPORT

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
DOCUMENTS = {
    "cabs": "[CABS](https://arxiv.org/abs/2503.01874), conflict-aware n:m sparsification",
    "magnitude": "task arithmetic on task vectors pruned by magnitude",
    "random": "task arithmetic on task vectors pruned at random ([DARE](https://arxiv.org/abs/2311.03099) with `rescale`)",
    "task_arithmetic": "[task arithmetic](https://arxiv.org/abs/2212.04089)",
    "ties": "[TIES](https://arxiv.org/abs/2306.01708)",
    "dare_linear": "[DARE](https://arxiv.org/abs/2311.03099)",
    "dare_ties": "[DARE](https://arxiv.org/abs/2311.03099) with TIES' sign election",
    "linear": "a weighted [mean](https://arxiv.org/abs/2203.05482) of the models",
}


def write_card(directory: Path, name: str, report: dict, summary: dict | None = None) -> None:
    """Write README.md for the merge that `report` (merge_report.json) describes; `summary`: its scores, once there are some."""
    write_file(directory / "README.md", card_text(name, report, summary).encode())


def add_scores(directory: Path, summary: dict) -> None:
    """Put the scores of a results file's `summary` into the card of a merged model, if it is one of ours."""
    path = directory / MERGE_REPORT
    report = read_json(path) if path.is_file() else {}
    if "method" in report:  # reports of earlier versions lack it
        write_card(directory, directory.resolve().name, report, summary)


def card_text(name: str, report: dict, summary: dict | None) -> str:
    """The card as Markdown with YAML front matter (huggingface_hub's ModelCardData)."""
    from huggingface_hub import ModelCardData

    method, parents = report["method"], list(report["models"])
    data = ModelCardData(
        base_model=[parent if _is_hub_id(parent) else Path(parent).name for parent in parents],
        base_model_relation="merge",
        library_name="transformers",
        tags=["merge", method],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}", f"Merged by {DOCUMENTS.get(method, f'`{method}`')} from:"]
    parts.append("\n".join(f"- `{parent}`" for parent in parents))
    if report.get("vectors"):
        parts += ["## What was kept of each task vector", _figures(report["vectors"])]
    if summary:
        parts += ["## Scores", _scores(summary)]
    parts += ["## Recipe", f"```yaml\n{report['recipe'].strip()}\n```"]
    parts += ["## Command", f"```bash\n{report.get('command') or command()}\n```"]
    return "\n\n".join(parts) + "\n"


def _is_hub_id(model: str) -> bool:
    return bool(_HUB_ID.fullmatch(model)) and not model.startswith(".") and not Path(model).is_dir()


def command() -> str:
    """What was typed, to be pasted again."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def _figures(vectors: list[dict]) -> str:
    lines = ["| task vector of | kept | share of its squared L2 norm | overlap with the others |", "|---|---|---|---|"]
    for vector in vectors:
        totals = vector["totals"]
        overlaps = [rate for rate in totals["overlap"].values() if rate is not None]
        overlap = ", ".join(f"{100 * rate:.2f} %" for rate in overlaps) or "–"
        share = "–" if totals["l2_share"] is None else f"{100 * totals['l2_share']:.1f} %"
        lines.append(f"| `{vector['model']}` | {100 * (totals['density'] or 0):.1f} % | {share} | {overlap} |")
    return "\n".join(lines)


def _scores(summary: dict) -> str:
    lines = ["| task | metric | shots | score |", "|---|---|---|---|"]
    for task, figures in summary["tasks"].items():
        if figures["value"] is None:
            continue
        scale = 100 if 0 <= figures["value"] <= 1 else 1
        error = "" if figures.get("stderr") is None else f" ± {figures['stderr'] * scale:.2f}"
        shots = "–" if figures.get("num_fewshot") is None else figures["num_fewshot"]
        lines.append(f"| {task} | {figures['metric']} | {shots} | {figures['value'] * scale:.2f}{error} |")
    return "\n".join(lines)
