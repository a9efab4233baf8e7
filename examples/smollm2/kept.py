"""Why the rows differ: what each way of pruning kept of the two task vectors, from the reports beside the models.

    python examples/smollm2/kept.py models/smollm2/seed_0

L2 share: the part of a vector's squared norm that is in what is kept. Overlap: kept by both / kept by either. Evenness:
1 where every group of m elements keeps the same number. Above the table stands how the two whole vectors lie to each
other.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples import markdown

VECTORS = ("countries", "elements")


@dataclass(frozen=True)
class Kept:
    """One way of pruning: for each vector, in the order in which they were pruned, its name and its report's totals."""

    name: str
    vectors: list[tuple[str, dict]]


def topic_of(path: str) -> str:
    """'models/smollm2/seed_0/task_vector_elements' -> 'elements'; a LoRA's 'elements_lora' stays apart."""
    return Path(path).name.removeprefix("task_vector_")


def chains(models: Path) -> list[Kept]:
    """Pairs that the prune script wrote, one entry a pair: the order is that of pruning."""
    found: dict[tuple, list] = {}
    for path in sorted(models.glob("*/prune_report.json")):
        report = json.loads(path.read_text())
        how = {key: report.get(key) for key in ("pruning_method", "n", "m", "sparsity_level", "order")}
        found.setdefault(json.dumps(how), []).append((report["position"], path.parent.name, report))
    kept = []
    for pair in found.values():
        pair.sort(key=lambda one: one[0])
        kept.append(Kept(pair[0][1], [(topic_of(report["vector"]), report["totals"]) for _, _, report in pair]))
    return kept


def one_pass(models: Path) -> list[Kept]:
    """Merges that pruned while they merged: their reports hold the same figures."""
    kept = []
    for path in sorted(models.glob("merged_*/merge_report.json")):
        vectors = json.loads(path.read_text()).get("vectors")
        if vectors:
            named = [(topic_of(vector["model"]), vector["totals"]) for vector in vectors]
            kept.append(Kept(path.parent.name.removeprefix("merged_"), named))
    return kept


def table(kept: list[Kept]) -> str:
    """Markdown: a line for each way of pruning; the first vector's figure / the second's."""
    lines = []
    for one in kept:
        totals = [figures for _, figures in one.vectors]
        overlap = next(iter(totals[-1]["overlap"].values()), None)
        cells = [
            " / ".join(f"{figures[key] or 0:.3f}" for figures in totals) for key in ("density", "l2_share", "evenness")
        ]
        order = ", ".join(topic for topic, _ in one.vectors)
        lines.append([one.name, order, *cells, f"{overlap or 0:.3f}"])
    return markdown.table(["models", "order", "density", "L2 share", "evenness", "overlap"], lines)


def between(first: Path, second: Path) -> tuple[float, float]:
    """(cosine of two task vectors, share of the positions that both change where they pull apart), in float64."""
    dot = squares_a = squares_b = 0.0
    apart = both = 0
    with safe_open(first / "model.safetensors", "np") as a, safe_open(second / "model.safetensors", "np") as b:
        for name in a.keys():  # noqa: SIM118 (no mapping: it has no iterator)
            x, y = (file.get_tensor(name).astype(np.float64).ravel() for file in (a, b))
            dot, squares_a, squares_b = dot + x @ y, squares_a + x @ x, squares_b + y @ y
            apart, both = apart + np.count_nonzero(x * y < 0), both + np.count_nonzero(x * y)
    return float(dot / np.sqrt(squares_a * squares_b)), float(apart / both)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="DIR", help="one seed's models")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    models = parse_args(argv).models
    cosine, apart = between(*(models / f"task_vector_{topic}" for topic in VECTORS))
    print(
        f"cosine of the two task vectors {cosine:.3f}; of the positions that both change, {apart:.1%} in opposite "
        "ways\n"
    )
    print(table(chains(models) + one_pass(models)))


if __name__ == "__main__":
    main()
