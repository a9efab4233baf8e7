#!/usr/bin/env python3
"""Extract a task vector: fine-tuned model minus base model, tensor by tensor.

    python extract_task_vector_7b.py \\
        --finetuned_model_path models/WestSeverus-7B-DPO-v2 \\
        --base_model_path models/Mistral-7b-v0.1-float16 \\
        --save_path models/task_vector_westseverus

    task vector = round(round(finetuned) - round(base)), rounding to --dtype, subtracting in float32

Run it once per fine-tuned model, with the same base. The task vector is a checkpoint like any other, with the
fine-tuned model's tokenizer. task_vector.json beside it records the base and a hash of every tensor, so that
prune_task_vector_7b.py finds the base and notices a wrong or damaged one. Streams: 0.2 GB of memory on 2
cores, 0.5 GB on 8, whatever the size of the model. If it is stopped,
run the same command again: it resumes at the last complete shard.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from common import cli
from common.errors import DataError
from common.exits import run_and_leave
from common.shards.blocks import blocks
from common.shards.checkpoint import Checkpoint, code_notes, config_with_dtype, copy_companions, open_checkpoint
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES, Tensor
from common.shards.job import Job, begin, describe, identity
from common.shards.layout import Output, plan_shards, slots_of
from common.shards.matching import check_floats, match, must_be_equal
from common.shards.places import check_places
from common.shards.stream import Task, Worker, copy_tensor, new_hash, not_finite, same_bytes
from common.shards.task_vector import config_notes, write_task_vector_json


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--finetuned_model_path",
        type=cli.path_or_hub_id,
        required=True,
        metavar="DIR|ORG/NAME",
        help="fine-tuned model: directory or Hugging Face Hub id",
    )
    parser.add_argument(
        "--base_model_path",
        type=cli.path_or_hub_id,
        required=True,
        metavar="DIR|ORG/NAME",
        help="its base model, in one dtype (see convert_dtype.py)",
    )
    parser.add_argument("--save_path", type=cli.path, required=True, metavar="DIR", help="where the task vector goes")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPE_CODES),
        default="float16",
        help="dtype both models are rounded to, and the vector's (default: %(default)s)",
    )
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


def extract_tensor(task: Task, worker: Worker, dtype: str, equal: dict[str, tuple[Tensor, Tensor]]) -> list[dict]:
    """Subtract one tensor; its record has the hashes of the base's bytes and of the vector's.

    `equal`: for tensors that the fine-tuned model spells out though they are tied, the pair that must hold the same bytes.
    """
    from common.pruners import kernels

    if not task.inputs[0].is_parameter:
        return copy_tensor(task, worker)
    if task.name in equal and not same_bytes(worker, *equal[task.name]):
        refuse_untied(*equal[task.name])
    finetuned, base = (worker.reader(tensor) for tensor in task.inputs)
    (writer,), base_hash, vector_hash, differs = worker.writers(task), new_hash(), new_hash(), 0
    for start, stop in blocks(base.numel, kernels.BLOCK):
        left, right, out = finetuned.read(start, stop), base.read(start, stop), writer.room(start, stop)
        more_differ, finite = kernels.subtract(left, finetuned.dtype, right, base.dtype, out, dtype)
        if not finite:
            refuse_difference(finetuned.tensor, left, base.tensor, right, dtype)
        differs += more_differ
        base_hash.update(right)
        vector_hash.update(out)
    return [{"base": base_hash.hexdigest(), "written": vector_hash.hexdigest(), "differs": differs}]


def refuse_untied(head: Tensor, embedding: Tensor) -> None:
    """Raise DataError for a spelled-out head that is not what the base ties it to."""
    raise DataError(
        f"tensor {head.name!r} in {head.path} differs from {embedding.name!r}, to which the base ties it; "
        "take a base that has a head of its own"
    )


def refuse_difference(finetuned: Tensor, left, base: Tensor, right, dtype: str) -> None:
    """Raise DataError for a difference that is not finite: an input is not, or it is too large."""
    from common.pruners import kernels

    for tensor, bits in ((finetuned, left), (base, right)):
        if not kernels.all_finite(bits, tensor.dtype):
            raise not_finite(tensor)
    raise DataError(
        f"tensor {base.name!r}: a value of {finetuned.path} or {base.path}, or their difference, is beyond "
        f"the largest {dtype}; extract with --dtype bfloat16 or float32"
    )


def plan(finetuned: Checkpoint, base: Checkpoint, save_path: Path, dtype: str, max_shard_size: int) -> Job:
    """Everything that is decided before a weight is read: `dtype` as in headers, e.g. "F16"."""
    check_floats(base)
    check_places([finetuned.path, base.path], [save_path])
    pairs = match(base, finetuned)
    described = [(t.name, dtype if t.is_parameter else t.dtype, t.shape) for t in base.tensors.values()]
    shards = plan_shards(described, max_shard_size)

    def inputs(name: str) -> tuple[Tensor, ...]:
        own = base.tensors[name]
        return (pairs[name], own) if name in pairs else (own,)

    parameters = {"dtype": DTYPE_NAMES[dtype], "max_shard_size": max_shard_size}
    return Job(
        title="extract",
        identity=identity("extract_task_vector_7b.py", parameters, [finetuned, base], [save_path]),
        outputs=[Output(save_path, tuple(shards))],
        tasks=[Task(slot.name, inputs(slot.name), (slot,), i) for i, slot in slots_of(shards)],
    )


def main(argv=None) -> None:
    args = parse_args(argv)
    dtype = DTYPE_CODES[args.dtype]
    finetuned, base = open_checkpoint(args.finetuned_model_path), open_checkpoint(args.base_model_path)
    job = plan(finetuned, base, args.save_path, dtype, args.max_shard_size)
    equal = {embedding.name: (head, embedding) for head, embedding in must_be_equal(base, finetuned)}
    if args.dry_run:
        print(describe(job, [finetuned, base]))
        return
    with begin(job, args.overwrite) as running:
        running.stream(partial(extract_tensor, dtype=dtype, equal=equal))
        for _, part, records in running.whole():
            copy_companions(finetuned.path, part)
            (part / "config.json").write_text(config_with_dtype(base.config, dtype), encoding="utf-8")
            write_task_vector_json(part, finetuned, base, dtype, records)
            values = sum(tensor.numel for tensor in base.tensors.values() if tensor.is_parameter)
            differs = sum(record.get("differs", 0) for record in records.values())
            print(f"{differs} of {values} values differ from the base ({100 * differs / max(values, 1):.2f} %)")
    if running.is_main:
        for note in [*config_notes(finetuned, base), *code_notes(finetuned, base)]:
            print(f"note: {note}")
        print(f"wrote {args.save_path} ({job.outputs[0].nbytes / 1e9:.3f} GB, {args.dtype})")


if __name__ == "__main__":
    run_and_leave(main)
