#!/usr/bin/env python3
"""Measure every script in pairs: ours, then a plain copy of the same bytes; print a table and one JSON line.

    python benchmarks/bench.py --layers 4 8 --pairs 3        (make bench LAYERS="4 8"; 32 layers are Mistral-7B)

The copy is `cat` of each input that is only read to nowhere and of as many inputs as there are outputs to new
files, then `sync`. Where the inputs take less than half of the memory they are read once before each run, ours and the
copy's, untimed, so that both find them in the page cache; larger ones both read from disk. Ratios are medians over the
pairs, so a disk that is slow today is slow for both. Peak memory is the largest resident set of the process as the
kernel reports it (wait4), imports and mapped files included. The usual way (for prune nm benchmarks/in_memory.py, for
task arithmetic mergekit-yaml) is run once, where it fits into memory. Models are made on the spot, and removed when
they are no longer needed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kernel_rates import rates_on_cpu, rates_on_gpu
from benchmarks.make_checkpoints import model_bytes
from common.cli import positive_int
from common.exits import run
from common.shards.places import check_disk

ROOT = Path(__file__).resolve().parent.parent
MODELS_ON_DISK = 5  # at most: base, 2 vectors, 2 outputs or copies
IN_MEMORY_NEEDS = 6.5  # times one model: what the obvious implementation was seen to need
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def case(command: list, reads: list[Path], copies: list[Path], outputs: list[Path]) -> dict:
    """A row of the table: the command, what it only reads, what it reads and writes as much as, what it writes."""
    return {"command": command, "reads": reads, "copies": copies, "outputs": outputs}


def extract(directory: Path, number: int) -> dict:
    """Extracting the vector of fine-tuned model `number`."""
    base, tuned, vector = (directory / name for name in ("base", f"finetuned{number}", f"vector{number}"))
    paths = ["--finetuned_model_path", tuned, "--base_model_path", base, "--save_path", vector]
    return case(["extract_task_vector_7b.py", *paths], [base], [tuned], [vector])


def prune(directory: Path, *flags: str) -> dict:
    """A prune of both vectors."""
    base, vectors = directory / "base", [directory / "vector1", directory / "vector2"]
    outputs = [directory / "out1", directory / "out2"]
    paths = ["--base_model_path", base, "--task_vector_paths", *vectors, "--save_directories", *outputs]
    return case(["prune_task_vector_7b.py", *paths, *flags], [base], vectors, outputs)


def model_cases(directory: Path) -> dict[str, dict]:
    """Rows of what is done to models, once base and finetuned1 are there."""
    base, out = directory / "base", directory / "out1"
    convert = ["convert_dtype.py", "--model_path", base, "--save_path", out, "--dtype", "bfloat16"]
    return {"convert": case(convert, [], [base], [out]), "extract": extract(directory, 1)}


def vector_cases(directory: Path) -> dict[str, dict]:
    """Rows of what is done to vectors, once base, vector1 and vector2 are there."""
    rows = {
        "prune nm 64:256": prune(directory),
        "prune random": prune(directory, "--pruning_method", "random", "--rescale"),
        "prune magnitude": prune(directory, "--pruning_method", "magnitude"),
    }
    if shutil.which("nvidia-smi"):
        for name, method in (("nm 64:256", "nm"), ("random", "random"), ("magnitude", "magnitude")):
            rows[f"prune {name}, cuda"] = prune(directory, "--pruning_method", method, "--device", "cuda")
    return rows


MERGES = {  # {row: (method, its parameters)}
    "merge task_arithmetic": ("task_arithmetic", {}),
    "merge linear": ("linear", {}),
    "merge cabs 64:256": ("cabs", {}),
    "merge random": ("random", {}),
    "merge magnitude": ("magnitude", {}),
    "merge ties": ("ties", {"density": 0.25}),
    "merge ties, rescaled": ("ties", {"density": 0.25, "rescale": True}),
    "merge dare_ties": ("dare_ties", {"density": 0.25}),
}


def write_recipe(path: Path, directory: Path, method: str, parameters: dict) -> Path:
    """A recipe that merges both fine-tuned models by a method."""
    models = [
        {"model": str(directory / name), "parameters": {"weight": weight}}
        for name, weight in (("finetuned1", 0.6), ("finetuned2", 0.5))
    ]
    recipe = {"merge_method": method, "models": models, "dtype": "float32", "out_dtype": "float16"}
    if parameters:
        recipe["parameters"] = parameters
    if method != "linear":
        recipe["base_model"] = str(directory / "base")
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def merge_cases(directory: Path) -> dict[str, dict]:
    """Rows of merges, once base and both fine-tuned models are there."""
    base, tuned, out = directory / "base", [directory / "finetuned1", directory / "finetuned2"], directory / "out1"
    rows = {}
    for number, (name, (method, parameters)) in enumerate(MERGES.items()):
        recipe = write_recipe(directory / f"recipe{number}.yml", directory, method, parameters)
        command = ["merge_and_evaluate_7b.py", "--recipe", recipe, "--merge_only"]
        only_read = [tuned[1]] if method == "linear" else [base, tuned[1]]
        rows[name] = case([*command, "--save_path", out], only_read, [tuned[0]], [out])
    return rows


def timed(command: list, quiet: bool = True) -> tuple[float, float]:
    """(seconds, peak GB) of one command, its failure raised."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if quiet else None,
    )
    error = process.stderr.read() if quiet else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[1]} failed: {error.decode().strip().splitlines()[-1]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def copy_command(row: dict) -> list[str]:
    """A shell command that reads and writes the bytes of a row, and syncs."""
    lines = [f"cat {source}/*.safetensors > /dev/null" for source in row["reads"]]
    for source, target in zip(row["copies"], row["outputs"], strict=True):
        lines.append(f"mkdir {target} && cat {source}/*.safetensors > {target}/copy")
    return ["sh", "-c", "set -e; " + "; ".join([*lines, "sync"])]


def measure(row: dict, pairs: int) -> dict:
    """Medians over pairs of (ours, copy), after one run of each to compile kernels, where the inputs fit into
    memory."""
    inputs = [path for directory in [*row["reads"], *row["copies"]] for path in directory.glob("*.safetensors")]
    size = {path: path.stat().st_size for path in inputs}
    moved = sum(size.values()) + sum(size[path] for path in inputs if path.parent in row["copies"])
    fits = sum(size.values()) < MEMORY / 2
    warm, rows = ["cat", *inputs] if fits else ["true"], []
    # Pair 0 is not counted: kernels are compiled in it. For a large model it would take minutes, and its kernels are
    # there already if a smaller one was measured before.
    for number in range(0 if fits else 1, pairs + 1):
        figures = []
        for command in ([sys.executable, *row["command"]], copy_command(row)):
            remove(row["outputs"])
            os.sync()
            timed(warm)
            figures += timed(command)
        if number:
            rows.append((figures[0], figures[2], figures[0] / figures[2], figures[1]))
    remove(row["outputs"])
    ours, copy, ratio, memory = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "seconds": ours,
        "copy": copy,
        "ratio": ratio,
        "peak_GB": memory,
        "GB_per_s": moved / ours / 1e9,
        "ratios": [row[2] for row in rows],
    }


def measure_obvious(directory: Path) -> tuple[float, float] | None:
    """(seconds, peak GB) of the in-memory implementation of the nm row, None where it would not fit."""
    row = prune(directory)
    if IN_MEMORY_NEEDS * sum(p.stat().st_size for p in (directory / "base").glob("*.safetensors")) > 0.8 * MEMORY:
        return None
    remove(row["outputs"])
    paths = [directory / "base", *row["copies"], *row["outputs"]]
    result = timed([sys.executable, ROOT / "benchmarks/in_memory.py", *paths, 64, 256])
    remove(row["outputs"])
    return result


def measure_mergekit(directory: Path) -> tuple[float, float] | None:
    """(seconds, peak GB) of mergekit-yaml on the task_arithmetic row, None where it would not fit or is missing."""
    if IN_MEMORY_NEEDS * sum(p.stat().st_size for p in (directory / "base").glob("*.safetensors")) > 1.2 * MEMORY:
        return None
    out = directory / "out1"
    remove([out])
    mergekit = Path(sys.executable).parent / "mergekit-yaml"
    if not mergekit.exists():
        return None
    result = timed([mergekit, write_recipe(directory / "usual.yml", directory, "task_arithmetic", {}), out])
    remove([out])
    return result


def make(directory: Path, layers: int, *names: str) -> None:
    """Models, in a process of its own: what a process has used counts as the memory of those it starts."""
    timed(
        [
            sys.executable,
            ROOT / "benchmarks/make_checkpoints.py",
            "--save_path",
            directory,
            "--layers",
            layers,
            "--names",
            *names,
        ]
    )


def measure_depth(directory: Path, layers: int, pairs: int, wanted) -> list[dict]:
    """The rows of one depth; wanted(row's name) says which."""
    results = []

    def measure_all(rows: dict[str, dict]) -> None:
        for script, row in rows.items():
            if wanted(script):
                results.append({"layers": layers, "script": script} | measure(row, pairs))
                print(table(results).splitlines()[-1], flush=True)

    remove([directory])
    check_disk({directory: MODELS_ON_DISK * model_bytes(layers)})
    make(directory, layers, "base", "finetuned1", "finetuned2")
    measure_all(model_cases(directory) | merge_cases(directory))
    if wanted("merge task_arithmetic") and (found := measure_mergekit(directory)):
        row = next(row for row in results if row["script"] == "merge task_arithmetic")
        row["obvious_seconds"], row["obvious_GB"] = found
    # Last, and each fine-tuned model is removed once its vector is there: five models are on disk at most.
    for number in (1, 2):
        timed([sys.executable, *extract(directory, number)["command"]])
        remove([directory / f"finetuned{number}"])
    measure_all(vector_cases(directory))
    if wanted("prune nm 64:256") and (found := measure_obvious(directory)):
        row = next(row for row in results if row["script"] == "prune nm 64:256")
        row["obvious_seconds"], row["obvious_GB"] = found
    remove([directory])
    return results


def table(results: list[dict]) -> str:
    """The rows of the table in benchmarks/README.md."""
    lines = [
        "| layers | script | seconds | GB/s | copy, seconds | × copy | peak memory, GB | the usual way: seconds, GB, "
        "× ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        obvious = (
            f"{r['obvious_seconds']:.0f}, {r['obvious_GB']:.1f}, {r['obvious_seconds'] / r['seconds']:.0f} ×"
            if "obvious_GB" in r
            else ""
        )
        lines.append(
            f"| {r['layers']} | {r['script']} | {r['seconds']:.1f} | {r['GB_per_s']:.2f} | {r['copy']:.1f} "
            f"| {r['ratio']:.2f} | {r['peak_GB']:.2f} | {obvious} |"
        )
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, as Linux knows it."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive_int, nargs="+", default=[4], help="depths to measure (default: 4)")
    parser.add_argument("--pairs", type=positive_int, default=3, help="pairs per row (default: 3)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name contains one of these words")
    parser.add_argument(
        "--save_path",
        type=Path,
        default=Path("models/bench"),
        help="where models are made (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    most = MODELS_ON_DISK * model_bytes(max(args.layers)) / 1e9
    print(f"disk: {most:.0f} GB are used under {args.save_path} at most", flush=True)
    results = []
    for layers in args.layers:
        directory = args.save_path.resolve() / f"layers{layers}"
        results += measure_depth(
            directory,
            layers,
            args.pairs,
            lambda name: not args.only or any(word in name for word in args.only),
        )
    kernels, gpu = rates_on_cpu(), rates_on_gpu()  # last: what this process holds counts as its children's memory
    print(f"\n{processor()}, {os.cpu_count()} cores, {MEMORY / 1e9:.0f} GB, float16, medians of {args.pairs} pairs\n")
    print(table(results))
    print(
        f"\nnm kernel: {kernels['ours_ns']:.2f} ns per element and vector on {kernels['threads']} threads, "
        f"topk + scatter {kernels['topk_scatter_ns']:.1f} ns, {kernels['topk_scatter_ns'] / kernels['ours_ns']:.0f} ×"
    )
    if gpu:
        rates = [f"{name} {figure:.3f}" for name, figure in gpu.items() if name != "name"]
        print(f"{gpu['name']}, ns per element: " + ", ".join(rates))
    print(json.dumps({"results": results, "kernels": kernels, "gpu": gpu}))


if __name__ == "__main__":
    run(main)
