#!/usr/bin/env python3
"""Measure every script in pairs: ours, then a plain copy of the same bytes; print a table and one JSON line.

    python benchmarks/bench.py --layers 4 8 --pairs 3        (make bench; 32 layers are Mistral-7B)

The copy is `cat` of each input that is only read to nowhere and of as many inputs as there are outputs to new
files, then `sync`. Ratios are medians over the pairs, so a disk that is slow today is slow for both. Peak memory is
the largest resident set of the process as the kernel reports it (wait4), imports and mapped files included. The
obvious implementation (benchmarks/in_memory.py) is run where it fits into memory. Models are made on the spot.
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

from benchmarks.make_checkpoints import make, model_bytes
from common.cli import positive_int, run
from common.plan import check_disk

ROOT = Path(__file__).resolve().parent.parent
MODELS_ON_DISK = 9  # base, 2 fine-tuned, 2 vectors, 2 outputs, 2 copies
IN_MEMORY_NEEDS = 6.5  # times one model: what the obvious implementation was seen to need


def prune(directory: Path, *flags: str) -> dict:
    """A prune of both vectors: the command, what it only reads, what it reads and writes as much as."""
    vectors = [directory / "vector1", directory / "vector2"]
    outputs = [directory / "out1", directory / "out2"]
    paths = [
        "--base_model_path",
        directory / "base",
        "--task_vector_paths",
        *vectors,
        "--save_directories",
        *outputs,
    ]
    command = ["prune_task_vector_7b.py", *paths, *flags]
    return {"command": command, "reads": [directory / "base"], "copies": vectors, "outputs": outputs}


def cases(directory: Path) -> dict[str, dict]:
    """{row of the table: what to run}."""
    base, tuned = directory / "base", directory / "finetuned1"
    out = directory / "out1"
    convert = ["convert_dtype.py", "--model_path", base, "--save_path", out, "--dtype", "bfloat16"]
    extract = [
        "extract_task_vector_7b.py",
        "--finetuned_model_path",
        tuned,
        "--base_model_path",
        base,
        "--save_path",
        out,
    ]
    rows = {
        "convert": {"command": convert, "reads": [], "copies": [base], "outputs": [out]},
        "extract": {"command": extract, "reads": [base], "copies": [tuned], "outputs": [out]},
        "prune nm 64:256": prune(directory),
        "prune magnitude": prune(directory, "--pruning_method", "magnitude"),
        "prune random": prune(directory, "--pruning_method", "random", "--rescale"),
    }
    if shutil.which("nvidia-smi"):
        rows["prune nm 64:256, cuda"] = prune(directory, "--device", "cuda")
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


def copy_command(case: dict) -> list[str]:
    """A shell command that reads and writes the bytes of a case, and syncs."""
    lines = [f"cat {source}/*.safetensors > /dev/null" for source in case["reads"]]
    for source, target in zip(case["copies"], case["outputs"], strict=True):
        lines.append(f"mkdir {target} && cat {source}/*.safetensors > {target}/copy")
    return ["sh", "-c", "set -e; " + "; ".join([*lines, "sync"])]


def measure(case: dict, pairs: int) -> dict:
    """Medians over pairs of (ours, copy), after one run of each to warm caches and compile kernels."""
    rows = []
    for number in range(pairs + 1):
        remove(case["outputs"])
        os.sync()
        seconds, memory = timed([sys.executable, *case["command"]])
        remove(case["outputs"])
        os.sync()
        copied, _ = timed(copy_command(case))
        if number:
            rows.append((seconds, copied, seconds / copied, memory))
    remove(case["outputs"])
    ours, copy, ratio, memory = (statistics.median(column) for column in zip(*rows, strict=True))
    moved = sum(
        p.stat().st_size
        for d in [*case["reads"], *case["copies"], *case["copies"]]
        for p in d.glob("*.safetensors")
    )
    return {"seconds": ours, "copy": copy, "ratio": ratio, "peak_GB": memory, "GB_per_s": moved / ours / 1e9,
            "ratios": [row[2] for row in rows]}  # fmt: skip


def measure_obvious(directory: Path) -> tuple[float, float] | None:
    """(seconds, peak GB) of the in-memory implementation, None where it would not fit."""
    need = IN_MEMORY_NEEDS * sum(p.stat().st_size for p in (directory / "base").glob("*.safetensors"))
    if need > 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    case = prune(directory)
    remove(case["outputs"])
    command = [
        sys.executable,
        ROOT / "benchmarks/in_memory.py",
        directory / "base",
        *case["copies"],
        *case["outputs"],
    ]
    result = timed([*command, 64, 256])
    remove(case["outputs"])
    return result


def measure_kernels() -> dict[str, float]:
    """ns per element and vector of nm 64:256 for two vectors on all cores: ours, and topk + scatter."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    from benchmarks.in_memory import nm_mask
    from common import kernels

    values = (np.random.default_rng(0).standard_normal(1 << 22) * 0.002).astype(np.float16)
    blocks = values.view(np.uint16).reshape(-1, kernels.BLOCK)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)

    def ours(block):
        first = kernels.nm_mask(block, "F16", None, 0, 64, 256)
        return kernels.nm_mask(block, "F16", first, 1, 64, 256)

    def obvious():
        tensor = torch.from_numpy(values)
        return nm_mask(tensor * ~nm_mask(tensor, 64, 256), 64, 256)

    def best(call, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times) / values.size / 2 * 1e9

    with ThreadPoolExecutor(threads) as pool:
        fast = best(lambda: list(pool.map(ours, blocks)), 20)
    return {"ours_ns": fast, "topk_scatter_ns": best(obvious, 3), "threads": threads}


def measure_gpu() -> dict[str, float]:
    """GB/s of bits read by nm 64:256 on the GPU, and of a plain copy on it (bytes read); empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from common.torch_kernels import nm_mask

    bits = torch.randint(0, 0x7C00, (1 << 26,), dtype=torch.int16, device="cuda")

    def rate(call):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        return 10 * bits.nbytes / (time.perf_counter() - start) / 1e9

    return {
        "name": torch.cuda.get_device_name(),
        "nm_GB_per_s": rate(lambda: nm_mask(bits, "F16", None, 0, 64, 256)),
        "copy_GB_per_s": rate(lambda: bits.clone()),
    }


def prepare(directory: Path, layers: int) -> None:
    """Models and task vectors of this depth, made once."""
    if not (directory / "vector2").is_dir():
        check_disk({directory: MODELS_ON_DISK * model_bytes(layers)})
        remove([directory])
        make(directory, layers)
        for number in (1, 2):
            timed([sys.executable, "extract_task_vector_7b.py", "--finetuned_model_path", directory / f"finetuned{number}",
                   "--base_model_path", directory / "base", "--save_path", directory / f"vector{number}"])  # fmt: skip


def table(results: list[dict]) -> str:
    """The rows of the README's table."""
    lines = [
        "| layers | script | seconds | GB/s | copy, seconds | × copy | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['layers']} | {r['script']} | {r['seconds']:.1f} | {r['GB_per_s']:.2f} | {r['copy']:.1f} "
        f"| {r['ratio']:.2f} | {r['peak_GB']:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=positive_int, nargs="+", default=[4], help="depths to measure (default: 4)"
    )
    parser.add_argument("--pairs", type=positive_int, default=3, help="pairs per row (default: 3)")
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these words")
    parser.add_argument(
        "--save_path",
        type=Path,
        default=Path("models/bench"),
        help="where models are made (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the models there for the next time")
    args = parser.parse_args(argv)
    print(
        f"disk: {MODELS_ON_DISK * model_bytes(max(args.layers)) / 1e9:.0f} GB are used under {args.save_path} at most",
        flush=True,
    )
    results, obvious = [], {}
    for layers in args.layers:
        directory = args.save_path.resolve() / f"layers{layers}"
        prepare(directory, layers)
        for script, case in cases(directory).items():
            if not args.only or any(word in script for word in args.only):
                results.append({"layers": layers, "script": script} | measure(case, args.pairs))
                print(table(results).splitlines()[-1], flush=True)
        if not args.only:
            obvious[layers] = measure_obvious(directory)
        if not args.keep:
            remove([directory])
    kernels, gpu = measure_kernels(), measure_gpu()
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, float16, medians of {args.pairs} pairs\n\n{table(results)}\n"
    )
    for layers, found in obvious.items():
        print(
            f"obvious in-memory prune, {layers} layers: "
            + (f"{found[0]:.0f} s, {found[1]:.1f} GB" if found else "does not fit")
        )
    print(f"nm kernel: {kernels['ours_ns']:.2f} ns per element and vector on {kernels['threads']} threads, "
          f"topk + scatter {kernels['topk_scatter_ns']:.1f} ns, {kernels['topk_scatter_ns'] / kernels['ours_ns']:.0f} ×")  # fmt: skip
    if gpu:
        print(
            f"{gpu['name']}: nm kernel {gpu['nm_GB_per_s']:.0f} GB/s, copy on the card {gpu['copy_GB_per_s']:.0f} GB/s"
        )
    print(json.dumps({"results": results, "obvious": obvious, "kernels": kernels, "gpu": gpu}))


if __name__ == "__main__":
    run(main)
