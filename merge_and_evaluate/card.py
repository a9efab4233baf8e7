"""The model card: README.md beside a merged model, with front matter as the Hugging Face Hub reads it."""

import re
import shlex
import sys
from pathlib import Path

from common.shards.documents import read_record
from common.shards.staging import write_file
from common.shards.verify import MERGE_REPORT

_SCORES = "\n## Scores\n"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
DOCUMENTS = {
    "cabs": "[CABS](https://arxiv.org/abs/2503.01874), conflict-aware n:m sparsification",
    "magnitude": "task arithmetic on task vectors pruned by magnitude",
    "random": (
        "task arithmetic on task vectors pruned at random ([DARE](https://arxiv.org/abs/2311.03099) with `rescale`)"
    ),
    "task_arithmetic": "[task arithmetic](https://arxiv.org/abs/2212.04089)",
    "ties": "[TIES](https://arxiv.org/abs/2306.01708)",
    "dare_linear": "[DARE](https://arxiv.org/abs/2311.03099)",
    "dare_ties": "[DARE](https://arxiv.org/abs/2311.03099) with TIES' sign election",
    "linear": "a weighted [mean](https://arxiv.org/abs/2203.05482) of the models",
}


def write_card(directory: Path, name: str, report: dict) -> None:
    """Write README.md for the merge that `report` (merge_report.json) describes."""
    write_file(directory / "README.md", card_text(name, report).encode())


def add_scores(directory: Path, title: str, table: str) -> None:
    """Put a table of scores into the card of a merged model, if it is one of ours; what else the card holds by now
    stays."""
    path, card = directory / MERGE_REPORT, directory / "README.md"
    report = read_record(path) if path.is_file() else {}
    if "method" not in report:  # reports of earlier versions lack it
        return
    text = card.read_text(encoding="utf-8") if card.is_file() else card_text(directory.resolve().name, report)
    write_file(card, with_scores(text, title, table).encode())


def with_scores(text: str, title: str, table: str) -> str:
    """The card with a table under this title, among other scores; one of the same title is replaced."""
    head, found, rest = text.partition(_SCORES)
    if not found:
        at = text.find("\n## Recipe\n")
        head, rest = (text[:at], text[at:]) if at >= 0 else (text.rstrip("\n") + "\n", "")
    end = rest.find("\n## ") if found else 0
    own, after = (rest, "") if end < 0 else (rest[:end], rest[end:])
    block = f"### {title}\n\n{table}\n"
    own, known = re.subn(rf"^### {re.escape(title)}\n\n(?:\|.*(?:\n|$))+", lambda _: block, own, flags=re.MULTILINE)
    if not known:
        own = (own.rstrip("\n") + "\n" if own.strip() else "") + "\n" + block
    return head + _SCORES + own + after


def card_text(name: str, report: dict) -> str:
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
    before = [f"- `{vector['model']}`: {_pruned(vector)}" for vector in vectors if "pruning_method" in vector]
    return "\n".join(lines + (["", "Pruned before the merge:", "", *before] if before else []))


def _pruned(vector: dict) -> str:
    """'n:m, 64 of every 256, conflict-aware, number 2 of 2'."""
    by = vector["pruning_method"]
    how = f"n:m, {vector['n']} of every {vector['m']}" if by == "nm" else f"{by}, density {vector['density']:g}"
    said = [how] + ["conflict-aware"] * bool(vector["conflict_aware"]) + ["rescaled"] * bool(vector["rescale"])
    return ", ".join([*said, f"number {vector['position']} of {len(vector['order'])}"])
