"""What pruning did: prune_report.json, the printed table.

Per tensor, and summed over kinds of tensors and over the model ("kept": kept with a value other than zero, which is
what the output changes):

  nonzero    elements of the vector that are not zero: where the fine-tuned model differs from the base
  kept       of those, how many are kept
  density    kept / elements
  overlap    with each other vector: kept by both / kept by either
  l2_share   share of the vector's squared L2 norm (sum of squares) that is in what is kept
  evenness   how evenly what is kept is spread over the whole groups of m: Jain's index of the counts per group,
             (sum c)^2 / (groups * sum c^2); 1 = every group keeps the same, 1/groups = one group keeps all
"""

import re

from common.pruners.tally import Tally, from_record
from common.shards.verify import PRUNE_REPORT as NAME  # noqa: F401

# The first pattern that is found counts: qkv is before v, whose patterns its names contain.
KINDS = [
    ("embeddings", r"embed_tokens|wte|wpe|embed_in|embed_positions|word_embeddings|tok_embeddings"),
    ("head", r"lm_head|embed_out|score\."),
    ("norms", r"norm|ln_\d|ln_f"),
    ("qkv", r"query_key_value|qkv_proj|c_attn|Wqkv"),
    ("q", r"q_proj|\.wq\b|query\b"),
    ("k", r"k_proj|\.wk\b|key\b"),
    ("v", r"v_proj|\.wv\b|value\b"),
    ("gate", r"gate_proj|\.w1\b"),
    ("up", r"up_proj|\.w3\b|fc1|c_fc|dense_h_to_4h"),
    ("down", r"down_proj|\.w2\b|fc2|mlp\.c_proj|dense_4h_to_h"),
    ("o", r"o_proj|\.wo\b|out_proj|attn\.c_proj|attention\.dense"),
]
# Below this share of what it was to keep, a vector's lack of changes is worth a line: less does not show in figures of
# two or three digits, and every vector in 16 bits has a few zeros.
_SHORT = 0.99


def kind_of(name: str) -> str:
    """The kind of tensor: kind_of("model.layers.3.self_attn.q_proj.weight") -> "q"."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def _ratio(part: float, whole: float) -> float | None:
    """In six digits: further ones of a sum of squares depend on the processor."""
    return float(f"{part / whole:.6g}") if whole else None


def measures(tally: Tally, labels: list[str], own: int) -> dict:
    """The report's figures for one tally; None where there is nothing to divide by (a vector of zeros)."""
    return {
        "numel": tally.numel,
        "nonzero": tally.nonzero,
        "kept": tally.kept,
        "density": _ratio(tally.kept, tally.numel),
        "overlap": {label: _ratio(tally.both[i], tally.either[i]) for i, label in enumerate(labels) if i != own},
        "l2_share": _ratio(tally.energy_kept, tally.energy),
        "evenness": _ratio(tally.kept_in_groups**2, tally.groups * tally.squares),
    }


def distinct(labels: list[str]) -> list[str]:
    """Labels of vectors, numbered where one is given more than once: ["a", "b", "a"] -> ["a (1)", "b", "a (3)"]."""
    return [f"{each} ({i})" if labels.count(each) > 1 else each for i, each in enumerate(labels, 1)]


def build(parameters: dict, labels: list[str], own: int, records: dict[str, dict]) -> dict:
    """The content of prune_report.json for vector number `own` from {tensor: record}."""
    tensors, kinds, total = {}, {}, Tally(both=(0,) * len(labels), either=(0,) * len(labels))
    for name, record in records.items():
        entry = {"hash": record["written"]}
        if "base_model_path" in parameters:  # --verify then knows which base it was added to
            entry["base"] = record["base"]
        if "tally" in record:  # a buffer has none
            tally, kind = from_record(record["tally"]), kind_of(name)
            entry |= {"kind": kind} | measures(tally, labels, own)
            kinds[kind] = kinds.get(kind, Tally()) + tally
            total += tally
        tensors[name] = entry
    order = [name for name, _ in KINDS] + ["other"]
    return parameters | {
        "vector": labels[own],
        "position": own + 1,
        "order": labels,
        "totals": measures(total, labels, own),
        "kinds": {kind: measures(kinds[kind], labels, own) for kind in order if kind in kinds},
        "tensors": tensors,
    }


def _percent(share: float) -> str:
    """_percent(0.0358) -> "3.58 %", _percent(0.25) -> "25 %"."""
    return f"{100 * share:.3g} %"


def shortfall(report: dict) -> str | None:
    """The line that says that a vector has fewer changes than it was to keep; None if it has as many.

    Not for what random masks miss by chance: the vector must have zeros, too.
    """
    numel, nonzero, kept = (report["totals"][key] for key in ("numel", "nonzero", "kept"))
    wanted = report["density"]
    if kept >= _SHORT * wanted * numel or nonzero >= _SHORT * numel:
        return None
    # Ranked, as many as were wanted could have been kept, had they not crowded in some scopes.
    crowded = report["pruning_method"] != "random" and nonzero >= wanted * numel
    return (
        f"{report['vector']}: {_percent(nonzero / numel)} of its weights differ from the base"
        f"{', unevenly spread' if crowded else ''}, so it changes {_percent(kept / numel)}, not {_percent(wanted)}"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _row(name: str, figures: dict, others: list[str]) -> list[str]:
    overlaps = [_cell(figures["overlap"][other]) for other in others]
    cells = [_cell(figures["density"]), *overlaps, _cell(figures["l2_share"]), _cell(figures["evenness"])]
    return [name, f"{figures['numel']:,}", *cells]


def table(report: dict) -> str:
    """The kinds of one report as the script prints them, and below it what shortfall() says."""
    others = [label for label in report["order"] if label != report["vector"]]
    heads = [f"overlap {i}" for i in range(1, len(others) + 1)] if len(others) > 1 else ["overlap"] * len(others)
    lines = [f"{report['vector']} (pruned {report['position']} of {len(report['order'])})"]
    lines += [f"  overlap {i}: with {label}" for i, label in enumerate(others, 1)] if len(others) > 1 else []
    named = [*report["kinds"].items(), ("all", report["totals"])]
    rows = [["kind", "elements", "density", *heads, "L2 share", "evenness"]]
    rows += [_row(name, figures, others) for name, figures in named]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  " + "  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join([*lines, *filter(None, [shortfall(report)])])
