"""What pruning did: prune_report.json, the printed table.

Per tensor, and summed over groups of like tensors and over the model:

  density    kept / elements
  overlap    with each other vector: kept by both / kept by either
  l2_share   share of the vector's squared L2 norm (sum of squares) that lies in what is kept
  evenness   how evenly what is kept is spread over the whole runs of m: Jain's index of the counts per run,
             (sum c)^2 / (runs * sum c^2); 1 = every run keeps the same, 1/runs = one run keeps all
"""

import re
from dataclasses import dataclass, field

from common.shards.verify import PRUNE_REPORT as NAME  # noqa: F401

GROUPS = [
    ("embeddings", r"embed_tokens|wte|wpe|embed_in|embed_positions|word_embeddings|tok_embeddings"),
    ("head", r"lm_head|embed_out|score\."),
    ("norms", r"norm|ln_\d|ln_f|layernorm"),
    ("q", r"q_proj|\.wq\b|query\b"),
    ("k", r"k_proj|\.wk\b|key\b"),
    ("v", r"v_proj|\.wv\b|value\b"),
    ("qkv", r"query_key_value|qkv_proj|c_attn|Wqkv"),
    ("gate", r"gate_proj|\.w1\b"),
    ("up", r"up_proj|\.w3\b|fc1|c_fc|dense_h_to_4h"),
    ("down", r"down_proj|\.w2\b|fc2|mlp\.c_proj|dense_4h_to_h"),
    ("o", r"o_proj|\.wo\b|out_proj|attn\.c_proj|attention\.dense"),
]


@dataclass
class Tally:
    """Counts of one vector's tensor (or of several, added up)."""

    numel: int = 0
    kept: int = 0
    both: list[int] = field(default_factory=list)  # per vector: kept by this one and that one
    either: list[int] = field(default_factory=list)
    energy_kept: float = 0.0
    energy: float = 0.0
    runs: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # see kernels.tally

    def add(self, other: "Tally") -> None:
        """Take another tensor's counts in."""
        self.numel += other.numel
        self.kept += other.kept
        self.both = [a + b for a, b in zip(self.both or [0] * len(other.both), other.both, strict=True)]
        self.either = [a + b for a, b in zip(self.either or [0] * len(other.either), other.either, strict=True)]
        self.energy_kept += other.energy_kept
        self.energy += other.energy
        self.runs = [a + b for a, b in zip(self.runs, other.runs, strict=True)]


def group_of(name: str) -> str:
    """The group of like tensors: group_of("model.layers.3.self_attn.q_proj.weight") -> "q"."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def _ratio(part: float, whole: float) -> float | None:
    return float(f"{part / whole:.6g}") if whole else None


def measures(tally: Tally, labels: list[str], own: int) -> dict:
    """The report's figures for one tally; None where there is nothing to divide by (a vector of zeros)."""
    _, runs, total, squares = tally.runs
    return {
        "numel": tally.numel,
        "kept": tally.kept,
        "density": _ratio(tally.kept, tally.numel),
        "overlap": {label: _ratio(tally.both[i], tally.either[i]) for i, label in enumerate(labels) if i != own},
        "l2_share": _ratio(tally.energy_kept, tally.energy),
        "evenness": _ratio(total * total, runs * squares),
    }


def build(parameters: dict, labels: list[str], own: int, records: dict[str, dict]) -> dict:
    """The content of prune_report.json for vector number `own` from {tensor: record}."""
    tensors, groups, total = {}, {}, Tally()
    for name, record in records.items():
        entry = {"hash": record["written"]}
        if "tally" in record:
            tally = Tally(**record["tally"])
            entry |= {"group": group_of(name)} | measures(tally, labels, own)
            groups.setdefault(group_of(name), Tally()).add(tally)
            total.add(tally)
        tensors[name] = entry
    order = [name for name, _ in GROUPS] + ["other"]
    return parameters | {
        "vector": labels[own],
        "position": own + 1,
        "order": labels,
        "totals": measures(total, labels, own),
        "groups": {name: measures(groups[name], labels, own) for name in order if name in groups},
        "tensors": tensors,
    }


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def table(report: dict) -> str:
    """The groups of one report as the script prints them."""
    others = [label for label in report["order"] if label != report["vector"]]
    heads = [f"overlap {i}" for i in range(1, len(others) + 1)] if len(others) > 1 else ["overlap"] * len(others)
    lines = [f"{report['vector']} (pruned {report['position']} of {len(report['order'])})"]
    lines += [f"  overlap {i}: with {label}" for i, label in enumerate(others, 1)] if len(others) > 1 else []
    columns = ["group", "elements", "density", *heads, "L2 share", "evenness"]
    rows = [
        [
            name,
            f"{g['numel']:,}",
            _cell(g["density"]),
            *(_cell(g["overlap"][o]) for o in others),
            _cell(g["l2_share"]),
            _cell(g["evenness"]),
        ]
        for name, g in [*report["groups"].items(), ("all", report["totals"])]
    ]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  " + "  ".join(cells))
    return "\n".join(lines)
