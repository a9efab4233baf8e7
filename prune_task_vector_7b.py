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

Conflict-aware: a vector keeps positions that no earlier one kept as long as there are any; each has its full budget.
The order is the order of the command line. Of equal magnitudes the lower index is kept. Zeros are never kept: where a
vector changes nothing, it is not in another's way. Each output is the base plus the pruned vector, a model that
mergekit reads, with prune_report.json beside it.

It streams: 0.3 GB of memory on 2 cores, 0.7 GB on 8, for models of any size; magnitude reads the vectors twice (more
often if conflict-aware) and keeps up to 0.5 GB of them in between. If it is stopped, run the same command again: it
resumes at the last complete shard. Several processes write the same bytes:

    torchrun --nproc-per-node 2 -- prune_task_vector_7b.py ...

Afterwards: draw two ways of pruning side by side from their reports, or check that files are still what was written:

    python prune_task_vector_7b.py --plot_path pruning.png \\
        --plot_reports models/magnitude_wildmarcoroni models/magnitude_westseverus \\
        --plot_with models/pruned_vector_wildmarcoroni models/pruned_vector_westseverus
    python prune_task_vector_7b.py --verify models/task_vector_wildmarcoroni models/merged
"""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from common import cli
from common.errors import DataError
from common.exits import run_and_leave
from common.pruners.heatmaps import draw, read_pruned
from common.pruners.prune_tensor import prune_tensor
from common.pruners.pruning import Pruning, in_passes
from common.pruners.report import NAME as REPORT
from common.pruners.report import build, distinct, table
from common.pruners.unchanged import zero_tensor
from common.shards.checkpoint import Checkpoint, config_with_dtype
from common.shards.companions import copy_companions
from common.shards.documents import read_record, write_json
from common.shards.dtypes import check_floats
from common.shards.headers import DTYPE_NAMES, Tensor
from common.shards.job import Job, begin, describe, downloaded, identity
from common.shards.layout import Output, plan_shards, slots_of
from common.shards.matching import mask_names, match_all
from common.shards.places import check_places, refuse_existing_outputs, refuse_unwritable_file
from common.shards.processes import group
from common.shards.stream import Task, Worker, copy_tensor
from common.shards.task_vector import (
    TaskVector,
    open_base,
    open_vectors,
    refuse_untied,
    whereabouts,
    write_pruned_vector_json,
)
from common.shards.verify import verify

USED_BY = {"n": ["nm"], "m": ["nm"], "sparsity_level": ["random", "magnitude"], "seed": ["random"]}
DEFAULTS = {"n": 64, "m": 256, "sparsity_level": 0.75, "seed": 0}


def add_vector_flags(parser: argparse.ArgumentParser) -> None:
    """What is pruned and where to write it."""
    # The numbered flags are the reference's, the lists are for another number of vectors; fill_in() makes one of both.
    group = parser.add_argument_group("vectors, in the order they are pruned")
    add = group.add_argument
    add("--task_vector_path1", type=cli.path_or_hub_id, metavar="DIR", help="first task vector; pruned as if alone")
    add("--task_vector_path2", type=cli.path_or_hub_id, metavar="DIR", help="second task vector")
    add("--save_directory1", type=cli.path, metavar="DIR", help="where to write the result for the first vector")
    add("--save_directory2", type=cli.path, metavar="DIR", help="where to write the result for the second vector")
    add(
        "--task_vector_paths",
        nargs="+",
        type=cli.path_or_hub_id,
        metavar="DIR",
        help="any number of vectors instead of 1 and 2",
    )
    add("--save_directories", nargs="+", type=cli.path, metavar="DIR", help="as many outputs, in the same order")
    add(
        "--base_model_path",
        type=cli.path_or_hub_id,
        metavar="DIR|ORG/NAME",
        help="default: the base recorded at extraction",
    )
    cli.add_skip_flag(group)


def add_pruning_flags(parser: argparse.ArgumentParser) -> None:
    """How it is pruned."""
    # Some defaults are only in the help: fill_in() fills them in, which must know what was given.
    add = parser.add_argument_group("pruning").add_argument
    add("--pruning_method", choices=["nm", "random", "magnitude"], default="nm", help="default: nm")
    add("--n", type=cli.positive_int, help="nm: elements to KEEP of every m (default: 64)")
    add("--m", type=cli.positive_int, help="nm: elements in a group (default: 256; density = n/m)")
    add(
        "--sparsity_level",
        type=cli.sparsity,
        metavar="FRACTION",
        help="random, magnitude: fraction to ZERO (default: 0.75, density 0.25)",
    )
    add(
        "--conflict_aware",
        action=argparse.BooleanOptionalAction,
        help="prefer positions that no earlier vector kept (default: yes for nm, no otherwise)",
    )
    add("--rescale", action="store_true", help="multiply what is kept by 1/density (DARE)")
    add(
        "--seed",
        type=int,
        help="random: masks depend only on the seed, the vectors' order and tensor names (default: 0)",
    )
    add(
        "--save_format",
        choices=["model", "task_vector"],
        default="model",
        help="model: base + pruned vector; task_vector: the pruned vector (default: model)",
    )
    add(
        "--device",
        default="cpu",
        metavar="cpu|cuda|cuda:1|mps",
        help="where to prune; the result is the same bit for bit, and a GPU is no faster (default: cpu)",
    )


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
        fill_in(parser, args)
    cli.check_plot_flags(parser, args, args.plot_reports or args.save_directories)
    return args


def fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
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
    if len(args.task_vector_paths) > 255:  # earlier vectors that kept a position are counted in a byte
        parser.error(f"{len(args.task_vector_paths)} task vectors: at most 255 at a time")
    # None is "not given": argparse's own defaults could not be told from a flag that the method does not use.
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
    """What the flags ask for."""
    density = args.n / args.m if args.pruning_method == "nm" else 1.0 - args.sparsity_level
    return Pruning(args.pruning_method, density, args.n, args.m, args.seed, args.conflict_aware, args.rescale)


def parameters_of(args: argparse.Namespace, pruning: Pruning) -> dict:
    """What the outputs depend on besides their inputs, as identity and report record it."""
    return {
        "pruning_method": pruning.method,
        **{flag: getattr(args, flag) for flag, methods in USED_BY.items() if pruning.method in methods},
        "density": pruning.density,
        "conflict_aware": pruning.conflict_aware,
        "rescale": pruning.rescale,
        "save_format": args.save_format,
        "evenness_over_groups_of": pruning.m,
    }


def engine_for(device: str):
    """What does the arithmetic; `cuda` under torchrun is each process's own GPU. Raises DataError if there is none."""
    from common.pruners.devices import check_bits
    from common.pruners.kernels import engine

    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and os.environ.get("LOCAL_RANK") else device
    arithmetic = engine(own)
    if device != "cpu" and not device.startswith("cuda"):  # those two are tested
        check_bits(arithmetic, device)
    return arithmetic


def plan(
    base: Checkpoint | None, vectors: list[TaskVector], args: argparse.Namespace, parameters: dict, passes: int
) -> tuple[Job, list[dict[str, Tensor]], list[str]]:
    """Everything decided before a weight is read: (job, pairs, notes).

    pairs: for each vector {tensor's name in the base: the vector's tensor}. passes: how often vectors are read.
    `base` is None when only vectors are written.
    """
    checkpoints = [vector.checkpoint for vector in vectors]
    whole = base or checkpoints[0]
    matches = match_all(whole, checkpoints, tuple(args.skip))
    for vector, matched in zip(vectors, matches, strict=True):
        refuse_untied(whole, vector, matched)
    pairs = [matched.pairs for matched in matches]
    hidden = {"max_shard_size": args.max_shard_size, "skip": args.skip}  # part of what a job is, not of its report
    job = job_of(base, vectors, pairs, args.save_directories, parameters | hidden)
    notes = dict.fromkeys(note for matched in matches for note in matched.notes)
    return replace(job, passes=passes), pairs, list(notes)


def with_checkpoints(
    base: Checkpoint | None, vectors: list[TaskVector], inputs: list[Checkpoint]
) -> tuple[Checkpoint | None, list[TaskVector]]:
    """Base and vectors with `inputs` for their checkpoints, the base's first where there is one."""
    own = inputs[-len(vectors) :]
    opened = [replace(vector, checkpoint=checkpoint) for vector, checkpoint in zip(vectors, own, strict=True)]
    return inputs[0] if base else None, opened


def job_of(
    base: Checkpoint | None,
    vectors: list[TaskVector],
    pairs: list[dict],
    save_directories: list[Path],
    parameters: dict,
) -> Job:
    """The files of every output, cut alike, and a task for each tensor; see plan()."""
    checkpoints = [vector.checkpoint for vector in vectors]
    whole = base or checkpoints[0]  # whose names the outputs have; another copy of the base may have others
    check_floats(whole)
    check_places([c.path for c in [whole, *checkpoints]], save_directories)
    if not base:
        refuse_mixed_dtypes(vectors, pairs)
    described = [(name, tensor.dtype, tensor.shape) for name, tensor in whole.tensors.items()]
    shards = tuple(plan_shards(described, parameters["max_shard_size"]))

    def inputs(name: str) -> tuple[Tensor, ...]:
        own = whole.tensors[name]
        if not own.is_parameter or not all(name in each for each in pairs):  # a buffer; left out with --skip
            return (own,)
        return ((own,) if base else ()) + tuple(each[name] for each in pairs)

    inputs_of_job = [*([base] if base else []), *checkpoints]
    return Job(
        title=f"prune {parameters['pruning_method']}",
        identity=identity("prune_task_vector_7b.py", parameters, inputs_of_job, save_directories),
        outputs=[Output(path, shards) for path in save_directories],
        tasks=[Task(slot.name, inputs(slot.name), (slot,) * len(vectors), shard) for shard, slot in slots_of(shards)],
    )


def refuse_mixed_dtypes(vectors: list[TaskVector], pairs: list[dict[str, Tensor]]) -> None:
    """Refuse to write vectors of different dtypes side by side: their shards would be cut at different tensors."""
    for vector, own in zip(vectors[1:], pairs[1:], strict=True):
        for name in pairs[0]:
            if name in own and own[name].dtype != pairs[0][name].dtype:
                raise DataError(
                    f"tensor {name!r}: {DTYPE_NAMES[pairs[0][name].dtype]} in {vectors[0].checkpoint.label} and "
                    f"{DTYPE_NAMES[own[name].dtype]} in {vector.checkpoint.label}; extract both with the same --dtype, "
                    "or prune them one by one"
                )


# --- one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prune:
    """What every tensor is pruned by: the rule, the names masks are drawn under, the arithmetic, the vectors."""

    pruning: Pruning
    names: dict[str, str]
    engine: object
    vectors: list[TaskVector]
    pairs: list[dict[str, Tensor]]
    adds_to_base: bool


def prune_and_check(task: Task, worker: Worker, by: Prune) -> list[dict]:
    """One tensor of every vector, its bytes held against the hashes that extraction recorded."""
    if not task.inputs[0].is_parameter:
        records = [record | {"vector": record["base"]} for record in copy_tensor(task, worker)]
    elif not all(task.name in each for each in by.pairs):  # left out of one vector, so of all
        records = copy_tensor(task, worker) if by.adds_to_base else zero_tensor(task, worker)
    else:
        records = prune_tensor(task, worker, by.pruning, by.names[task.name], by.engine)
    for record, vector, own in zip(records, by.vectors, by.pairs, strict=True):
        # Another copy of the base may have other names, or spell a tied head out; a buffer may be in it alone.
        want = vector.hashes.get(own[task.name].name if task.name in own else task.name)
        if want:
            check_hashes(task, record, want, vector, by.adds_to_base)
    return records


def check_hashes(task: Task, record: dict, want: dict, vector: TaskVector, adds_to_base: bool) -> None:
    """Refuse bytes that are not those that extraction recorded (`want`), of the base or of the vector."""
    if adds_to_base and record["base"] != want["base"]:
        raise DataError(
            f"tensor {task.name!r} in {task.inputs[0].path}: not the base that {vector.checkpoint.label} was extracted "
            "from; give that one as --base_model_path, or extract the vector again"
        )
    if "vector" in record and record["vector"] != want["vector"]:
        raise DataError(
            f"tensor {task.name!r} in {vector.checkpoint.path}: not the bytes that were extracted; "
            "extract the vector again"
        )


def finish(
    part: Path, base: Checkpoint | None, first: TaskVector, vector: TaskVector, report: dict, records: dict
) -> None:
    """Add config, the fine-tuned model's tokenizer and the report to an output. Its tensors are named as in the base,
    or as in the `first` vector."""
    copy_companions(vector.checkpoint.path, part)
    tensors = (base or first.checkpoint).tensors
    dtypes = {tensors[name].dtype for name in records if tensors[name].is_parameter}
    text = config_with_dtype((base or vector.checkpoint).config, dtypes.pop() if len(dtypes) == 1 else None)
    (part / "config.json").write_text(text, encoding="utf-8")
    if base is None:
        write_pruned_vector_json(part, vector, first, records)
    write_json(part / REPORT, report)


def look(args: argparse.Namespace) -> bool:
    """--verify, or --plot_reports: look at what was written before. Returns whether that was asked for."""
    if args.verify:
        verify(args.verify)
    elif args.plot_reports:
        runs = [args.plot_reports, *([args.plot_with] if args.plot_with else [])]
        draw([read_pruned(paths) for paths in runs], Path(args.plot_path))
    return bool(args.verify or args.plot_reports)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.plot_path:  # drawn last, when the outputs are there
        refuse_unwritable_file(args.plot_path)
    if look(args):
        return
    beside = [read_pruned(args.plot_with)] if args.plot_with else []
    pruning = pruning_of(args)
    parameters = parameters_of(args, pruning)
    if not args.dry_run:
        refuse_existing_outputs(args.save_directories, args.overwrite)
    vectors = open_vectors(args.task_vector_paths, tuple(args.skip))
    base = open_base(vectors, args.base_model_path) if args.save_format == "model" else None
    engine = engine_for(args.device)  # numba takes a moment to import: after what headers refuse
    passes = 2 if in_passes(pruning, engine.BLOCK) else 1
    job, pairs, notes = plan(base, vectors, args, parameters, passes)
    for note in notes if group().is_main else ():
        print(f"note: {note}")
    inputs = [*([base] if base else []), *(vector.checkpoint for vector in vectors)]
    if args.dry_run:
        print(describe(job, inputs))
        return
    if any(checkpoint.is_remote for checkpoint in inputs):  # only now that everything fits are they downloaded
        base, vectors = with_checkpoints(base, vectors, downloaded(job, inputs, args.overwrite))
        job, pairs, _ = plan(base, vectors, args, parameters, passes)
    whole, labels = base or vectors[0].checkpoint, distinct([vector.checkpoint.label for vector in vectors])
    with begin(job, args.overwrite) as running:
        by = Prune(pruning, mask_names(whole), engine, vectors, pairs, base is not None)
        running.stream(partial(prune_and_check, by=by))
        for own, part, records in running.whole():
            source = {"base_model_path": whereabouts(base)} if base else {}
            source |= {"vector_path": whereabouts(vectors[own].checkpoint)}
            report = build(parameters | source | {"hash": "xxh3_128"}, labels, own, records)
            finish(part, base, vectors[0], vectors[own], report, records)
    if not running.is_main:
        return
    for path, output in zip(args.save_directories, job.outputs, strict=True):
        print(table(read_record(output.final / REPORT)))
        print(f"wrote {path} ({output.nbytes / 1e9:.3f} GB), the figures of every tensor in {path}/{REPORT}\n")
    if args.plot_path:
        draw([read_pruned(args.save_directories), *beside], Path(args.plot_path))


if __name__ == "__main__":
    run_and_leave(main)
