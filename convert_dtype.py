#!/usr/bin/env python3
"""Convert a model to one dtype, so that base and fine-tuned models are subtracted in the same numbers.

    python convert_dtype.py --model_path mistralai/Mistral-7B-v0.1 --save_path models/Mistral-7b-v0.1-float16

Every parameter is rounded to --dtype, to nearest even. Integer buffers and rotary inv_freq stay as they are;
config, tokenizer and chat template are copied. A finite value that would become infinite is an error that names
its tensors, unless --clamp. Streams: 0.2 GB of memory on 2 cores, 0.5 GB on 8, whatever the size of the model.
Stopped, the same command goes on from the last whole shard.
"""

import argparse
from functools import partial
from pathlib import Path

from common.cli import add_output_flags
from common.errors import DataError
from common.exits import run_and_leave
from common.shards.checkpoint import Checkpoint, config_with_dtype, copy_companions
from common.shards.headers import DTYPE_CODES
from common.shards.job import Job, describe, execute, input_files
from common.shards.layout import Output, plan_shards
from common.shards.matching import check_floats
from common.shards.places import check_places
from common.shards.remote import describe_checkpoint, fetch
from common.shards.stream import Task, Worker, blocks, copy_tensor, new_hash, not_finite


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path",
        default="mistralai/Mistral-7B-v0.1",
        metavar="DIR|ORG/NAME",
        help="model directory or Hugging Face Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--save_path",
        default="models/Mistral-7b-v0.1-float16",
        metavar="DIR",
        help="where the converted model goes (default: %(default)s)",
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
    add_output_flags(parser)
    return parser.parse_args(argv)


def convert_tensor(task: Task, worker: Worker, dtype: str) -> list[dict]:
    """Round one tensor to `dtype`; its record counts the values changed and zeroed.

    What overflows is clamped here, and refused in complete() unless that was asked for.
    """
    from common.pruners import kernels

    source, digest = task.inputs[0], new_hash()
    changed = zeroed = 0
    overflow = False
    for start, stop in blocks(source.numel, kernels.BLOCK):
        bits, out = worker.read(source, start, stop), worker.room(task, 0, start, stop)
        more_changed, more_zeroed, finite = kernels.convert(bits, source.dtype, out, dtype)
        if not finite:
            if not kernels.all_finite(bits, source.dtype):
                raise not_finite(source)
            overflow = True
            kernels.clamp(out, dtype)
        digest.update(out)
        changed, zeroed = changed + more_changed, zeroed + more_zeroed
    return [{"changed": changed, "zeroed": zeroed, "overflow": overflow, "written": digest.hexdigest()}]


def plan(model: Checkpoint, args: argparse.Namespace) -> Job:
    check_floats(model)
    check_places([model.path], [Path(args.save_path)])
    target = DTYPE_CODES[args.dtype]
    shards = plan_shards(
        [(t.name, target if t.is_parameter else t.dtype, t.shape) for t in model.tensors.values()],
        args.max_shard_size,
    )
    tasks = [Task(slot.name, (model.tensors[slot.name],), (slot,), i) for i, s in enumerate(shards) for slot in s.slots]
    return Job(
        title="convert",
        identity={
            "script": "convert_dtype.py",
            "parameters": {"dtype": args.dtype, "clamp": args.clamp, "max_shard_size": args.max_shard_size},
            "inputs": input_files([model]),
        },
        outputs=[Output(Path(args.save_path), tuple(shards))],
        tasks=tasks,
        process=partial(process, dtype=target),
        complete=partial(complete, model, target, args.clamp),
    )


def process(task: Task, worker: Worker, dtype: str) -> list[dict]:
    if task.inputs[0].is_parameter:
        return convert_tensor(task, worker, dtype)
    return copy_tensor(task, worker)


def complete(model: Checkpoint, dtype: str, clamp: bool, output: Output, records: dict) -> None:
    """Refuse what overflowed, name by name; otherwise add config and tokenizer and say what changed."""
    overflowed = [name for name, record in records.items() if record.get("overflow")]
    if overflowed and not clamp:
        names = ", ".join(repr(name) for name in overflowed[:8]) + (" and more" if len(overflowed) > 8 else "")
        raise DataError(
            f"{len(overflowed)} tensor(s) of {model.label} hold values beyond the largest {dtype}: {names}; "
            "convert to bfloat16 or float32, or accept the nearest finite value with --clamp"
        )
    copy_companions(model.path, output.part)
    (output.part / "config.json").write_text(config_with_dtype(model.config, dtype), encoding="utf-8")
    values = sum(tensor.numel for tensor in model.tensors.values() if tensor.is_parameter)
    changed, zeroed = (sum(record.get(key, 0) for record in records.values()) for key in ("changed", "zeroed"))
    print(f"{values} values: {changed} changed by rounding, {zeroed} of them became zero")
    if overflowed:
        print(f"clamped: values in {len(overflowed)} tensor(s), the first {overflowed[0]!r}")


def main(argv=None) -> None:
    args = parse_args(argv)
    model = describe_checkpoint(args.model_path)
    job = plan(model, args)
    if args.dry_run:
        print(describe(job, [model]))
        return
    if model.is_remote:
        model = fetch(model)
        job = plan(model, args)
    if execute(job, args.overwrite):
        print(f"wrote {args.save_path} ({job.outputs[0].nbytes / 1e9:.3f} GB, {args.dtype})")


if __name__ == "__main__":
    run_and_leave(main)
