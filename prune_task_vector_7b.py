#!/usr/bin/env python3
"""Sparsify task vectors together, so that they keep different weights (CABS), and add each to the base.

    python prune_task_vector_7b.py \\
        --task_vector_path1 models/task_vector_wildmarcoroni \\
        --task_vector_path2 models/task_vector_westseverus \\
        --n 64 --m 256 --pruning_method nm \\
        --save_directory1 models/pruned_vector_wildmarcoroni \\
        --save_directory2 models/pruned_vector_westseverus

  nm         keep the n largest of every m consecutive elements; conflict-aware unless --no-conflict_aware
  magnitude  keep the largest 1 - sparsity_level of each tensor
  random     keep each element with probability 1 - sparsity_level, seeded (with --rescale: DARE)

Conflict-aware: a vector keeps positions that no earlier one kept as long as there are any; each keeps its full
budget. The order is the order of the command line. Equal magnitudes: the lower index is kept. Each output is the
base plus the pruned vector, a model that mergekit reads, with prune_report.json beside it. Streams: 0.3 GB
of memory on 2 cores, 0.7 GB on 8, whatever the size of the model; magnitude reads the vectors twice and keeps up
to 0.5 GB of them in between. Several processes: torchrun
--nproc-per-node 2 -- prune_task_vector_7b.py ... writes the same bytes. Stopped, the same command goes on.

Later: a picture of two runs side by side, from their reports; and are the files still what was written?

    python prune_task_vector_7b.py --plot_path pruning.png \\
        --plot_reports models/magnitude_wildmarcoroni models/magnitude_westseverus \\
        --plot_with models/pruned_vector_wildmarcoroni models/pruned_vector_westseverus
    python prune_task_vector_7b.py --verify models/task_vector_wildmarcoroni models/merged
"""

import argparse
import os
from functools import partial
from pathlib import Path

from common import cli
from common.errors import DataError
from common.exits import run_and_leave
from common.pruners.heatmaps import draw, read_run
from common.pruners.prune_tensor import prune_tensor
from common.pruners.pruning import Pruning
from common.pruners.report import NAME as REPORT
from common.pruners.report import build, table
from common.shards.checkpoint import Checkpoint, config_with_dtype, copy_companions
from common.shards.documents import read_json, write_json
from common.shards.headers import Tensor
from common.shards.job import Job, describe, execute, input_files
from common.shards.layout import Output, plan_shards
from common.shards.matching import check_floats, mask_names, match
from common.shards.places import check_places
from common.shards.stream import Task, Worker, copy_tensor
from common.shards.task_vector import TaskVector, open_base, open_vectors, write_pruned_vector_json
from common.shards.unchanged import zero_tensor
from common.shards.verify import verify

USED_BY = {"n": ["nm"], "m": ["nm"], "sparsity_level": ["random", "magnitude"], "seed": ["random"]}
DEFAULTS = {"n": 64, "m": 256, "sparsity_level": 0.75, "seed": 0}


def add_vector_flags(parser: argparse.ArgumentParser) -> None:
    """What is pruned and where it goes."""
    add = parser.add_argument_group("vectors, in the order they are pruned").add_argument
    add("--task_vector_path1", metavar="DIR", help="first task vector; pruned as if alone")
    add("--task_vector_path2", metavar="DIR", help="second task vector")
    add("--save_directory1", metavar="DIR", help="where base + first pruned vector goes")
    add("--save_directory2", metavar="DIR", help="where base + second pruned vector goes")
    add("--task_vector_paths", nargs="+", metavar="DIR", help="any number of vectors instead of 1 and 2")
    add("--save_directories", nargs="+", metavar="DIR", help="as many outputs, in the same order")
    add("--base_model_path", metavar="DIR|ORG/NAME", help="default: the base recorded at extraction")
    cli.add_skip_flag(parser)


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """How it is pruned."""
    add = parser.add_argument_group("pruning").add_argument
    add("--pruning_method", choices=["nm", "random", "magnitude"], default="nm", help="default: nm")
    add("--n", type=cli.positive_int, help="nm: elements to KEEP of every m (default: 64)")
    add("--m", type=cli.positive_int, help="nm: elements in a run (default: 256; density = n/m)")
    add(
        "--sparsity_level",
        type=cli.sparsity,
        metavar="FRACTION",
        help="random, magnitude: fraction to ZERO (default: 0.75, density 0.25)",
    )
    add(
        "--conflict_aware",
        action=argparse.BooleanOptionalAction,
        help="keep positions no earlier vector kept first (default: yes for nm, no otherwise)",
    )
    add("--rescale", action="store_true", help="multiply what is kept by 1/density (DARE)")
    add("--seed", type=int, help="random: masks depend on it, on order and names alone (default: 0)")
    add(
        "--save_format",
        choices=["model", "task_vector"],
        default="model",
        help="model: base + pruned vector; task_vector: the pruned vector (default: model)",
    )
    add("--device", default="cpu", metavar="cpu|cuda|cuda:1", help="where to prune; same bits (default: cpu)")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vector_flags(parser)
    add_pruning_flags(parser)
    cli.add_output_flags(parser)
    looking = parser.add_argument_group("look at what was written")
    cli.add_plot_flags(looking)
    cli.add_verify_flag(looking)
    args = parser.parse_args(argv)
    looks = cli.is_alone(parser, args, "plot_reports", "plot_path", "plot_with")
    if not looks and not cli.is_alone(parser, args, "verify"):
        settle(parser, args)
    cli.check_plot_flags(parser, args, args.plot_reports or args.save_directories)
    return args


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or that the method does not use; fill in defaults."""
    numbered = [args.task_vector_path1, args.task_vector_path2, args.save_directory1, args.save_directory2]
    if (args.task_vector_paths or args.save_directories) and any(numbered):
        parser.error("give either --task_vector_paths and --save_directories, or the numbered flags, not both")
    if any(numbered):
        if not all(numbered):
            parser.error(
                "--task_vector_path1, --task_vector_path2, --save_directory1 and --save_directory2 go together; "
                "for another number of vectors use --task_vector_paths and --save_directories"
            )
        args.task_vector_paths, args.save_directories = numbered[:2], numbered[2:]
    if not args.task_vector_paths or not args.save_directories:
        parser.error(
            "give the vectors and where the results go: --task_vector_path1/2 and --save_directory1/2, "
            "or --task_vector_paths and --save_directories"
        )
    if len(args.task_vector_paths) != len(args.save_directories):
        parser.error(f"{len(args.task_vector_paths)} task vectors but {len(args.save_directories)} save directories")
    for flag, methods in USED_BY.items():
        if getattr(args, flag) is None:
            setattr(args, flag, DEFAULTS[flag])
        elif args.pruning_method not in methods:
            parser.error(
                f"--{flag} is not used by --pruning_method {args.pruning_method}, only by {' and '.join(methods)}"
            )
    if args.n > args.m:
        parser.error(f"--n {args.n} of --m {args.m}: n is how many of m are kept, so at most m")
    if args.conflict_aware is None:
        args.conflict_aware = args.pruning_method == "nm"


def pruning_of(args: argparse.Namespace) -> Pruning:
    density = args.n / args.m if args.pruning_method == "nm" else 1.0 - args.sparsity_level
    return Pruning(args.pruning_method, density, args.n, args.m, args.seed, args.conflict_aware, args.rescale)


def check_hashes(task: Task, record: dict, want: dict, vector: TaskVector, save_format: str) -> None:
    """Refuse bytes that are not those that extraction recorded (`want`), of the base or of the vector."""
    if save_format == "model" and record["base"] != want["base"]:
        raise DataError(
            f"tensor {task.name!r} in {task.inputs[0].path}: not the base that {vector.checkpoint.label} was extracted from; "
            "give that one as --base_model_path, or extract the vector again"
        )
    if "vector" in record and record["vector"] != want["vector"]:
        raise DataError(
            f"tensor {task.name!r} in {vector.checkpoint.path}: not the bytes that were extracted; extract the vector again"
        )


def process(task: Task, worker: Worker, pruning, names, pairs, save_format, engine, vectors) -> list[dict]:
    """One task, checked against the hashes that extraction recorded."""
    own = task.inputs[0]
    if own.is_parameter and not all(task.name in p for p in pairs):  # left out of one vector, so of all
        records = copy_tensor(task, worker) if save_format == "model" else zero_tensor(task, worker)
    elif own.is_parameter:
        records = prune_tensor(task, worker, pruning, names[task.name], save_format, engine)
    else:
        records = [record | {"vector": record["base"]} for record in copy_tensor(task, worker)]
    for record, vector, own in zip(records, vectors, pairs, strict=True):
        # Another copy of the base may have other names, or spell a tied head out; a buffer may be in it alone.
        want = vector.hashes.get(own[task.name].name if task.name in own else task.name)
        if want:
            check_hashes(task, record, want, vector, save_format)
    return records


def engine_for(device: str):
    """What does the arithmetic; `cuda` under torchrun is each process's own GPU. Raises DataError if it is not there."""
    if device == "cpu":
        from common.pruners import kernels

        return kernels
    from common.pruners.kernels.torch_engine import engine

    return engine(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device)


def plan(base: Checkpoint | None, vectors: list[TaskVector], args: argparse.Namespace) -> Job:
    """Everything decided before a weight is read. `base` is None when only vectors are written."""
    checkpoints = [vector.checkpoint for vector in vectors]
    whole = base or checkpoints[0]
    check_floats(whole)
    matches = [match(whole, checkpoint, tuple(args.skip)) for checkpoint in checkpoints]
    pairs = [matched.pairs for matched in matches]
    for note in dict.fromkeys(note for matched in matches for note in matched.notes):
        print(f"note: {note}")
    check_places([c.path for c in [whole, *checkpoints]], [Path(path) for path in args.save_directories])
    pruning = pruning_of(args)

    def described(j: int) -> list[tuple]:
        typed = whole.tensors if base else checkpoints[j].tensors
        return [(name, typed[name].dtype, typed[name].shape) for name in whole.tensors]

    plans = [plan_shards(described(j), args.max_shard_size) for j in range(len(vectors))]
    if len({tuple(tuple(s.name for s in shard.slots) for shard in shards) for shards in plans}) > 1:
        raise DataError("the task vectors differ in dtype; extract them with the same --dtype")
    tasks = [
        Task(
            name,
            inputs(whole.tensors[name], base, [p.get(name) for p in pairs]),
            tuple(s[i].slots[k] for s in plans),
            i,
        )
        for i, shard in enumerate(plans[0])
        for k, name in enumerate(slot.name for slot in shard.slots)
    ]
    parameters = parameters_of(pruning, args)
    return Job(
        title=f"prune {args.pruning_method}",
        identity={
            "script": "prune_task_vector_7b.py",
            "parameters": parameters
            | {"max_shard_size": args.max_shard_size, "outputs": args.save_directories, "skip": args.skip},
            "inputs": input_files([*([base] if base else []), *checkpoints]),
        },
        outputs=[Output(Path(path), tuple(s)) for path, s in zip(args.save_directories, plans, strict=True)],
        tasks=tasks,
        process=partial(
            process,
            pruning=pruning,
            names=mask_names(whole),
            pairs=pairs,
            save_format=args.save_format,
            engine=engine_for(args.device),
            vectors=vectors,
        ),
        complete=partial(complete, base, vectors, parameters, args),
        passes=2 if pruning.method == "magnitude" else 1,
    )


def inputs(own: Tensor, base: Checkpoint | None, vectors: list[Tensor | None]) -> tuple[Tensor, ...]:
    """What one task reads: buffers are carried over from `own`; parameters need base (for a model) and vectors."""
    if not own.is_parameter or None in vectors:
        return (own,)
    return (own, *vectors) if base else tuple(vectors)


def parameters_of(pruning: Pruning, args: argparse.Namespace) -> dict:
    """What the masks depend on, as identity and report record it."""
    used = {flag: getattr(args, flag) for flag, methods in USED_BY.items() if pruning.method in methods}
    return {
        "pruning_method": pruning.method,
        **used,
        "density": pruning.density,
        "conflict_aware": pruning.conflict_aware,
        "rescale": pruning.rescale,
        "save_format": args.save_format,
        "evenness_over_runs_of": pruning.m,
    }


def complete(base, vectors: list[TaskVector], parameters: dict, args, output: Output, records: dict) -> None:
    """Add config, the fine-tuned model's tokenizer and the report to an output; print its table."""
    own = [str(path) for path in args.save_directories].index(str(output.final))
    vector = vectors[own]
    copy_companions(vector.checkpoint.path, output.part)
    source = base or vector.checkpoint
    dtypes = {source.tensors[name].dtype for name in records if source.tensors[name].is_parameter}
    config = config_with_dtype(source.config, dtypes.pop()) if len(dtypes) == 1 else None
    text = config or (source.path / "config.json").read_text(encoding="utf-8")
    (output.part / "config.json").write_text(text, encoding="utf-8")
    if base is None:
        write_pruned_vector_json(output.part, vector, records)
    labels = [v.checkpoint.label for v in vectors]
    report = build(parameters | {"hash": "xxh3_128"}, labels, own, records)
    write_json(output.part / REPORT, report)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.verify:
        verify(args.verify)
        return
    beside = [read_run(args.plot_with)] if args.plot_with else []
    if args.plot_reports:
        draw([read_run(args.plot_reports), *beside], Path(args.plot_path))
        return
    vectors = open_vectors(args.task_vector_paths, tuple(args.skip))
    base = open_base(vectors, args.base_model_path) if args.save_format == "model" else None
    job = plan(base, vectors, args)
    if args.dry_run:
        print(describe(job, [*([base] if base else []), *(vector.checkpoint for vector in vectors)]))
        return
    if not execute(job, args.overwrite):
        return
    for path, output in zip(args.save_directories, job.outputs, strict=True):
        print(table(read_json(output.final / REPORT)))
        print(f"wrote {path} ({output.nbytes / 1e9:.3f} GB), the figures of every tensor in {path}/{REPORT}\n")
    if args.plot_path:
        draw([read_run(args.save_directories), *beside], Path(args.plot_path))


if __name__ == "__main__":
    run_and_leave(main)
