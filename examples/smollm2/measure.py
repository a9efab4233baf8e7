"""Run one step, and append what it took to a file: seconds, CPU seconds, peak memory, bytes written.

    python examples/smollm2/measure.py real/seed_0/costs.jsonl "prune, CABS" -- prune_task_vector_7b.py --n 64 …

The step is a Python script with its flags. Memory is the largest resident set, files that are mapped included; bytes
are what then lies in the directories after --save_path and --save_directory1, 2, … A step that fails is not recorded.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path


def written_by(command: list[str]) -> int:
    """Bytes in the directories that a command was told to write to; --eval_only reads its --save_path."""
    if "--eval_only" in command:
        return 0
    flags = ("--save_path", "--save_director")
    named = [Path(value) for flag, value in zip(command, command[1:], strict=False) if flag.startswith(flags)]
    return sum(file.stat().st_size for folder in named for file in folder.rglob("*") if file.is_file())


def measured(command: list[str]) -> tuple[int, dict]:
    """(exit status, figures) of a command that is run to its end."""
    began = time.monotonic()
    status = subprocess.run([sys.executable, *command], check=False).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
        "written_mb": round(written_by(command) / 1e6),
        "load": round(os.getloadavg()[0], 1),
    }
    return status, figures


def main() -> None:
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        raise SystemExit(__doc__)
    costs, step, command = Path(sys.argv[1]), sys.argv[2], sys.argv[4:]
    status, figures = measured(command)
    if status == 0:
        with open(costs, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
