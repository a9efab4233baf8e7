#!/usr/bin/env python3
"""Extract a task vector: fine-tuned model minus base model, tensor by tensor.

    python extract_task_vector_7b.py \\
        --finetuned_model_path models/WestSeverus-7B-DPO-v2 \\
        --base_model_path models/Mistral-7b-v0.1-float16 \\
        --save_path models/task_vector_westseverus

    task vector = round(round(finetuned) - round(base)), rounding to --dtype, subtracting in float32

A LoRA adapter is taken like a model: task vector = round(scale * B * A), +0.0 for tensors that it does not adapt.
Models are matched by name, with transformers' help where one of them has other names, ties spelled out or constants;
what was resolved is printed. What only one of them has is left out with --skip, other tokens with --vocabulary common:

    python extract_task_vector_7b.py --finetuned_model_path models/with-value-head --skip 'v_head.*' ...
    python extract_task_vector_7b.py --finetuned_model_path models/with-two-more-tokens --vocabulary common ...

Run it once per fine-tuned model, with the same base. The task vector is a checkpoint like any other, with the
fine-tuned model's tokenizer. task_vector.json beside it records the base and a hash of every tensor, so that
prune_task_vector_7b.py finds the base and notices a wrong or damaged one. Streams: 0.2 GB of memory on 2
cores, 0.5 GB on 8, whatever the size of the model. Stopped, the same command goes on from the last whole shard.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from common.cli import add_output_flags, add_skip_flag
from common.errors import DataError
from common.exits import run_and_leave
from common.shards.adapters import Adapter, is_adapter, match_adapter, open_adapter, without
from common.shards.checkpoint import (
    Checkpoint,
    companion_files,
    config_with_dtype,
    copy_companions,
    open_checkpoint,
)
from common.shards.headers import DTYPE_CODES, Tensor
from common.shards.hub import local_directory
from common.shards.job import Job, describe, execute, input_files
from common.shards.layout import Output, plan_shards
from common.shards.matching import Match, check_floats, match
from common.shards.places import check_places
from common.shards.remote import describe_checkpoint, described, fetch
from common.shards.settings import config_notes
from common.shards.stream import Task, Worker, blocks, copy_tensor, new_hash, not_finite, same_bytes
from common.shards.task_vector import write_task_vector_json
from common.shards.unchanged import zero_tensor
from common.shards.vocabulary import common_elements, common_vocabulary, pieces


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--finetuned_model_path",
        required=True,
        metavar="DIR|ORG/NAME",
        help="fine-tuned model, or a LoRA adapter (adapter_config.json): directory or Hugging Face Hub id",
    )
    parser.add_argument(
        "--base_model_path",
        required=True,
        metavar="DIR|ORG/NAME",
        help="its base model, in one dtype (see convert_dtype.py)",
    )
    parser.add_argument("--save_path", required=True, metavar="DIR", help="where the task vector goes")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPE_CODES),
        default="float16",
        help="dtype both models are rounded to, and the vector's (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary",
        choices=["same", "common"],
        default="same",
        help="common: of embeddings and output head subtract only rows of tokens that both tokenizers have under the "
        "same id; the vector then has the base's tokenizer (default: same, both have the same tokens)",
    )
    add_skip_flag(parser)
    add_output_flags(parser)
    return parser.parse_args(argv)


def extract_tensor(task: Task, worker: Worker, dtype: str, common: tuple | None = None) -> list[dict]:
    """Subtract one tensor; its record has the hashes of the base's bytes and of the vector's.

    common: runs of elements that both models have, where they differ in their tokens; +0.0 elsewhere.
    """
    from common.pruners import kernels

    finetuned, base = task.inputs
    base_hash, vector_hash, differs, energy = new_hash(), new_hash(), 0, [0.0, 0.0]
    for start, stop, in_both in pieces(blocks(base.numel, kernels.BLOCK), common):
        right, out = worker.read(base, start, stop, 1), worker.room(task, 0, start, stop)
        # Where only the base has a row it is subtracted from itself: +0.0, and refused if it is not finite.
        left = worker.read(finetuned, start, stop, 0) if in_both else right
        more_differ, finite = kernels.subtract(
            left, finetuned.dtype if in_both else base.dtype, right, base.dtype, out, dtype
        )
        if not finite:
            refuse_difference(finetuned if in_both else base, left, base, right, dtype)
        differs += more_differ
        energy = [energy[0] + sampled_energy(out, dtype), energy[1] + sampled_energy(right, base.dtype)]
        base_hash.update(right)
        vector_hash.update(out)
    return [{"base": base_hash.hexdigest(), "written": vector_hash.hexdigest(), "differs": differs, "energy": energy}]


def sampled_energy(bits, dtype: str) -> float:
    """The sum of squares of every 64th value: good enough to tell a fine-tuned model from an unrelated one."""
    from common.pruners import kernels

    sample = np.ascontiguousarray(bits[::64])
    values = np.empty(sample.size, np.uint32)
    kernels.convert(sample, dtype, values, "F32")
    return float(np.square(values.view(np.float32), dtype=np.float64).sum())


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


def process(task: Task, worker: Worker, dtype: str, equal: dict, common: dict, products: dict) -> list[dict]:
    own = task.inputs[-1]
    if task.name in products:
        from common.pruners.lora_tensor import lora_tensor

        return lora_tensor(task, worker, products[task.name], dtype)
    if not own.is_parameter:
        return copy_tensor(task, worker)
    if len(task.inputs) == 1:
        return zero_tensor(task, worker)
    for extra in equal.get(task.name, ()):
        if not same_bytes(worker, extra, task.inputs[0]):
            raise DataError(
                f"tensor {extra.name!r} in {extra.path} differs from {task.inputs[0].name!r}, to which the base ties it; "
                f"take a base that has a head of its own, or leave it out with --skip {extra.name!r}"
            )
    return extract_tensor(task, worker, dtype, common.get(task.name))


def plan(finetuned: Checkpoint, base: Checkpoint, matched: Match, adapter: Adapter | None, common: dict, args) -> Job:
    check_places([finetuned.path, base.path], [Path(args.save_path)])
    pairs = matched.pairs
    target = DTYPE_CODES[args.dtype]
    shards = plan_shards(
        [(t.name, target if t.is_parameter else t.dtype, t.shape) for t in base.tensors.values()],
        args.max_shard_size,
    )
    products = adapter.products if adapter else {}

    def inputs(name: str) -> tuple[Tensor, ...]:
        read = products[name].reads if name in products else (pairs[name],) if name in pairs else ()
        return (*read, base.tensors[name])

    tasks = [Task(slot.name, inputs(slot.name), (slot,), i) for i, shard in enumerate(shards) for slot in shard.slots]
    return Job(
        title="extract",
        identity={
            "script": "extract_task_vector_7b.py",
            "parameters": {
                "dtype": args.dtype,
                "max_shard_size": args.max_shard_size,
                "skip": args.skip,
                "vocabulary": args.vocabulary,
                "adapter": adapter.config if adapter else None,
            },
            "inputs": input_files([finetuned, base]),
        },
        outputs=[Output(Path(args.save_path), tuple(shards))],
        tasks=tasks,
        process=partial(process, dtype=target, equal=matched.equal, common=common, products=products),
        complete=partial(complete, finetuned, base, target, args.vocabulary),
    )


def complete(
    finetuned: Checkpoint, base: Checkpoint, dtype: str, vocabulary: str, output: Output, records: dict
) -> None:
    """Add config, a tokenizer (the base's where only its tokens count, else the fine-tuned model's) and task_vector.json; say how much of the model differs."""
    has_tokens = vocabulary == "same" and companion_files(finetuned.path)  # an adapter may come without a tokenizer
    copy_companions((finetuned if has_tokens else base).path, output.part)
    (output.part / "config.json").write_text(config_with_dtype(base.config, dtype), encoding="utf-8")
    write_task_vector_json(output.part, finetuned, base, dtype, records)
    values = sum(tensor.numel for tensor in base.tensors.values() if tensor.is_parameter)
    differs = sum(record.get("differs", 0) for record in records.values())
    print(f"{differs} of {values} values differ from the base ({100 * differs / max(values, 1):.2f} %)")
    vector, own = (sum(record.get("energy", (0, 0))[i] for record in records.values()) for i in (0, 1))
    notes = config_notes(finetuned, base)
    if vector > own:
        notes.append(
            f"the vector's norm is {(vector / own) ** 0.5 if own else float('inf'):.1f} times the base's (by every 64th value); "
            f"fine-tuning changes a few percent: is {finetuned.label} a fine-tuned model of {base.label}?"
        )
    for note in notes:
        print(f"note: {note}")


def open_finetuned(args: argparse.Namespace, base: Checkpoint) -> tuple[Checkpoint, Adapter | None]:
    """The fine-tuned side, its weights still on the Hub where they are; and the adapter, where it is one."""
    label = args.finetuned_model_path
    remote = described(label)
    directory = remote.path if remote else local_directory(label)
    if not remote and is_adapter(directory):
        adapter = open_adapter(label, directory, base, free_rows=args.vocabulary == "common")
        return adapter.checkpoint, without(adapter, base, tuple(args.skip))
    return remote or open_checkpoint(label), None


def compare(finetuned: Checkpoint, base: Checkpoint, adapter: Adapter | None, args) -> tuple[Job, list[str]]:
    """(what is to be done, notes): every decision and refusal, from headers, configs and tokenizers."""
    common = {}
    if adapter:
        matched = match_adapter(base, adapter)
    else:
        matched = match(base, finetuned, tuple(args.skip), free_rows=args.vocabulary == "common")
    notes = list(matched.notes)
    if args.vocabulary == "common":
        vocabulary = common_vocabulary(base, finetuned)
        common = common_elements(base, matched.pairs, vocabulary)
        notes += vocabulary.notes
    return plan(finetuned, base, matched, adapter, common, args), notes


def main(argv=None) -> None:
    args = parse_args(argv)
    base = describe_checkpoint(args.base_model_path)
    check_floats(base)
    finetuned, adapter = open_finetuned(args, base)
    job, notes = compare(finetuned, base, adapter, args)
    for note in notes:
        print(f"note: {note}")
    if args.dry_run:
        print(describe(job, [finetuned, base]))
        return
    if finetuned.is_remote or base.is_remote:
        finetuned, base = fetch(finetuned), fetch(base)
        job, _ = compare(finetuned, base, adapter, args)
    if execute(job, args.overwrite):
        print(f"wrote {args.save_path} ({job.outputs[0].nbytes / 1e9:.3f} GB, {args.dtype})")


if __name__ == "__main__":
    run_and_leave(main)
