"""What each step took, out of what measure.py wrote.

python examples/smollm2/costs.py real/seed_0
"""

import argparse
import json
from pathlib import Path

COLUMNS = ("seconds", "cpu_seconds", "peak_mb", "written_mb", "load")


def read_costs(directory: Path) -> list[dict]:
    """The steps in their order; of a step that was run more than once, the last run."""
    path = directory / "costs.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: {path}: not there; run the example first (make real)")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    return list({step["step"]: step for step in steps}.values())


def table(steps: list[dict]) -> str:
    """Markdown, a line for each step, the sums below."""
    lines = [
        "| step | seconds | CPU seconds | peak MB | written MB | load at its end |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    lines += [f"| {step['step']} | " + " | ".join(f"{step[column]:g}" for column in COLUMNS) + " |" for step in steps]
    seconds, cpu = (sum(step[column] for step in steps) for column in COLUMNS[:2])
    peak, written = max(step["peak_mb"] for step in steps), sum(step["written_mb"] for step in steps)
    return "\n".join([*lines, f"| all | {seconds:.0f} | {cpu:.0f} | {peak} | {written} | |"])


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="results of one seed")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    print(table(read_costs(parse_args(argv).directory)))


if __name__ == "__main__":
    main()
