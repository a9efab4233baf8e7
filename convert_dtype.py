#!/usr/bin/env python3
"""Convert a model to one dtype, so that base and fine-tuned models use the same number format.

    python convert_dtype.py --model_path mistralai/Mistral-7B-v0.1 --save_path models/Mistral-7b-v0.1-float16

Every parameter is rounded to --dtype, to nearest even. Integer buffers and rotary inv_freq stay as they are. A finite
value that would become infinite is an error that names its tensors, unless --clamp is given. Config, tokenizer and chat
template are copied; convert_report.json has a hash of every tensor, which --verify of the later scripts reads.

It streams: 0.2 GB of memory on 2 cores, 0.5 GB on 8, for a model of any size. If it is stopped, run the same command
again: it resumes at the last complete shard.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from common import cli
from common.errors import DataError
from common.exits import run_and_leave
from common.shards.blocks import blocks
from common.shards.checkpoint import Checkpoint, code_notes, config_with_dtype
from common.shards.companions import copy_companions
from common.shards.dtypes import check_floats, wider_than
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES
from common.shards.job import Job, begin, describe, downloaded, identity
from common.shards.layout import Output, plan_shards, slots_of
from common.shards.places import check_places, refuse_existing_outputs
from common.shards.remote import describe_checkpoint
from common.shards.stream import Task, Worker, copy_tensor, new_hash, not_finite
from common.shards.verify import write_convert_report


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Every flag has a default: the README that this collection mirrors runs the script without any.
    parser.add_argument(
        "--model_path",
        type=cli.path_or_hub_id,
        default="mistralai/Mistral-7B-v0.1",
        metavar="DIR|ORG/NAME",
        help="model directory or Hugging Face Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--save_path",
        type=cli.path,
        default="models/Mistral-7b-v0.1-float16",
        metavar="DIR",
        help="where to write the converted model (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPE_CODES),
        default="float16",
        help="dtype of every parameter (default: %(default)s)",
    )
    parser.add_argument(
        "--clamp",
        action="store_true",
        help="a value too large for the dtype becomes its largest finite one instead of an error",
    )
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


def convert_tensor(task: Task, worker: Worker, dtype: str) -> list[dict]:
    """Round one tensor to `dtype`; its record counts the values changed and zeroed.

    What overflows is clamped here, and refused in refuse_overflow() unless that was asked for: then all are named.
    """
    from common.pruners import kernels

    if not task.inputs[0].is_parameter:
        return copy_tensor(task, worker)
    source, (writer,), digest = worker.reader(task.inputs[0]), worker.writers(task), new_hash()
    counts, overflow = np.zeros(2, np.int64), False  # of what changed, of what became zero
    for start, stop in blocks(source.numel, kernels.BLOCK):
        bits, out = source.read(start, stop), writer.room(start, stop)
        if not kernels.convert(bits, source.dtype, out, dtype, counts):
            if not kernels.all_finite(bits, source.dtype):
                raise not_finite(source.tensor)
            overflow = True
            kernels.clamp(out, dtype)
        digest.update(out)
    changed, zeroed = counts.tolist()
    return [{"changed": changed, "zeroed": zeroed, "overflow": overflow, "written": digest.hexdigest()}]


def plan(model: Checkpoint, save_path: Path, dtype: str, clamp: bool, max_shard_size: int) -> Job:
    """Everything that is decided before a weight is read: `dtype` as in headers, e.g. "F16"."""
    check_floats(model)
    check_places([model.path], [save_path])
    described = [(t.name, dtype if t.is_parameter else t.dtype, t.shape) for t in model.tensors.values()]
    shards = plan_shards(described, max_shard_size)
    parameters = {"dtype": DTYPE_NAMES[dtype], "clamp": clamp, "max_shard_size": max_shard_size}
    return Job(
        title="convert",
        identity=identity("convert_dtype.py", parameters, [model], [save_path]),
        outputs=[Output(save_path, tuple(shards))],
        tasks=[Task(slot.name, (model.tensors[slot.name],), (slot,), i) for i, slot in slots_of(shards)],
    )


def refuse_overflow(model: Checkpoint, dtype: str, overflowed: list[str]) -> None:
    """Raise DataError for tensors with values that `dtype` cannot hold."""
    names = ", ".join(repr(name) for name in overflowed[:8]) + (" and more" if len(overflowed) > 8 else "")
    raise DataError(
        f"{len(overflowed)} tensor(s) of {model.label} hold values beyond the largest {DTYPE_NAMES[dtype]}: {names}; "
        f"convert to {wider_than(dtype)}, or accept the nearest finite value with --clamp"
    )


def print_changes(model: Checkpoint, records: dict[str, dict]) -> None:
    """Say what rounding did to the model."""
    values = sum(tensor.numel for tensor in model.tensors.values() if tensor.is_parameter)
    changed, zeroed = (sum(record.get(key, 0) for record in records.values()) for key in ("changed", "zeroed"))
    print(f"{values} values: {changed} changed by rounding, {zeroed} of them became zero")


def main(argv=None) -> None:
    args = parse_args(argv)
    dtype = DTYPE_CODES[args.dtype]
    if not args.dry_run:
        refuse_existing_outputs([args.save_path], args.overwrite)
    model = describe_checkpoint(args.model_path)
    job = plan(model, args.save_path, dtype, args.clamp, args.max_shard_size)
    if args.dry_run:
        print(describe(job, [model]))
        return
    if model.is_remote:  # only now that everything fits is it downloaded
        (model,) = downloaded(job, [model], args.overwrite)
        job = plan(model, args.save_path, dtype, args.clamp, args.max_shard_size)
    with begin(job, args.overwrite) as running:
        running.stream(partial(convert_tensor, dtype=dtype))
        for _, part, records in running.whole():
            overflowed = [name for name, record in records.items() if record.get("overflow")]
            if overflowed and not args.clamp:
                refuse_overflow(model, dtype, overflowed)
            copy_companions(model.path, part)
            (part / "config.json").write_text(config_with_dtype(model.config, dtype), encoding="utf-8")
            write_convert_report(part, model, dtype, records)
            print_changes(model, records)
            if overflowed:
                print(f"clamped: values in {len(overflowed)} tensor(s), the first {overflowed[0]!r}")
    if running.is_main:
        for note in code_notes(model):
            print(f"note: {note}")
        print(f"wrote {args.save_path} ({job.outputs[0].nbytes / 1e9:.3f} GB, {args.dtype})")


if __name__ == "__main__":
    run_and_leave(main)
