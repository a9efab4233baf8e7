#!/usr/bin/env python3
"""Extract a task vector: fine-tuned model minus base model, tensor by tensor.

    python extract_task_vector_7b.py \\
        --finetuned_model_path models/WestSeverus-7B-DPO-v2 \\
        --base_model_path models/Mistral-7b-v0.1-float16 \\
        --save_path models/task_vector_westseverus

    task vector = round(round(finetuned) - round(base)), rounding to --dtype, subtracting in float32

A LoRA adapter works like a model: task vector = round(scale * B * A), +0.0 for tensors that it does not adapt.
Models are matched by name, with transformers' help where one of them has other names, ties spelled out, constants or
fused experts; what was resolved is printed. Use --skip to leave out tensors that only one of them has, and --vocabulary
common if their tokens differ:

    python extract_task_vector_7b.py --finetuned_model_path models/with-value-head --skip 'v_head.*' ...
    python extract_task_vector_7b.py --finetuned_model_path models/with-two-more-tokens --vocabulary common ...

Run it once per fine-tuned model, with the same base. The task vector is a checkpoint like any other, with the
fine-tuned model's tokenizer. task_vector.json beside it records the base and a hash of every tensor, so that
prune_task_vector_7b.py finds the base and notices a wrong or damaged one.

It streams: 0.2 GB of memory on 2 cores, 0.5 GB on 8, for a model of any size. If it is stopped, run the same command
again: it resumes at the last complete shard.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from common import cli
from common.errors import DataError
from common.exits import run_and_leave
from common.pruners.unchanged import zero_tensor
from common.shards.adapters import Adapter, Product, is_adapter, match_adapter, open_adapter, without
from common.shards.blocks import blocks
from common.shards.checkpoint import Checkpoint, code_notes, config_with_dtype, open_checkpoint
from common.shards.companions import copy_companions, has_tokenizer
from common.shards.dtypes import check_floats, wider_than
from common.shards.hashing import text_hash
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES, Tensor
from common.shards.hub import local_directory
from common.shards.job import Job, begin, describe, downloaded, identity
from common.shards.layout import Output, plan_shards, slots_of
from common.shards.matching import match_all
from common.shards.places import check_places, refuse_existing_outputs
from common.shards.processes import group
from common.shards.remote import describe_checkpoint, remote_checkpoint
from common.shards.settings import config_notes
from common.shards.stream import Task, Worker, copy_tensor, new_hash, not_finite, same_bytes
from common.shards.task_vector import write_task_vector_json
from common.shards.vocabulary import common_elements, common_vocabulary, pieces


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--finetuned_model_path",
        type=cli.path_or_hub_id,
        required=True,
        metavar="DIR|ORG/NAME",
        help="fine-tuned model, or a LoRA adapter (adapter_config.json): directory or Hugging Face Hub id",
    )
    parser.add_argument(
        "--base_model_path",
        type=cli.path_or_hub_id,
        required=True,
        metavar="DIR|ORG/NAME",
        help="its base model, in one dtype (see convert_dtype.py)",
    )
    parser.add_argument(
        "--save_path", type=cli.path, required=True, metavar="DIR", help="where to write the task vector"
    )
    # Not the models' own dtype: a bfloat16 model minus a float16 base would leave rounding noise in the vector.
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
        help="common: in embeddings and output head, subtract only rows of tokens that both tokenizers have under the "
        "same id; the vector then has the base's tokenizer (default: same, both have the same tokens)",
    )
    cli.add_skip_flag(parser)
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


# --- one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """What is decided of every tensor: `dtype` as in headers, e.g. "F16".

    pairs: {base's name: the fine-tuned model's tensor}. equal: tied tensors that must hold the same bytes. common: runs
    of elements that both have, where they differ in their tokens. products: B·A of a LoRA adapter.
    """

    dtype: str
    pairs: dict[str, Tensor]
    equal: dict[str, tuple[Tensor, ...]]
    common: dict[str, tuple]
    products: dict[str, Product]

    def inputs(self, base: Tensor) -> tuple[Tensor, ...]:
        """What is read for one tensor of the base; the base's own comes last."""
        if base.name in self.products:
            return (*self.products[base.name].reads, base)
        return (self.pairs[base.name], base) if base.name in self.pairs else (base,)


def extract_tensor(task: Task, worker: Worker, by: Extraction) -> list[dict]:
    """One tensor of the vector: a difference, a product, +0.0, or, for a buffer, the base's own bytes."""
    if task.name in by.products:
        from common.pruners.lora_tensor import lora_tensor

        return lora_tensor(task, worker, by.products[task.name], by.dtype)
    if not task.inputs[-1].is_parameter:
        return copy_tensor(task, worker)
    if len(task.inputs) == 1:
        return zero_tensor(task, worker)
    for extra in by.equal.get(task.name, ()):
        if not same_bytes(worker, extra, task.inputs[0]):
            refuse_untied(extra, task.inputs[0])
    return subtract_tensor(task, worker, by.dtype, by.common.get(task.name))


def subtract_tensor(task: Task, worker: Worker, dtype: str, common: tuple | None) -> list[dict]:
    """Subtract one tensor; its record has the hashes of the base's bytes and of the vector's.

    common: runs of elements that both models have, where they differ in their tokens; +0.0 elsewhere.
    """
    from common.pruners import kernels

    (finetuned, base), (writer,) = (worker.reader(tensor) for tensor in task.inputs), worker.writers(task)
    base_hash, vector_hash, differs, energy = new_hash(), new_hash(), np.zeros(1, np.int64), [0.0, 0.0]
    for start, stop, in_both in pieces(blocks(base.numel, kernels.BLOCK), common):
        right, out = base.read(start, stop), writer.room(start, stop)
        # Where only the base has a row it is subtracted from itself: +0.0, and refused if it is not finite.
        left, left_dtype = (finetuned.read(start, stop), finetuned.dtype) if in_both else (right, base.dtype)
        if not kernels.subtract(left, left_dtype, right, base.dtype, out, dtype, differs):
            refuse_difference(finetuned.tensor if in_both else base.tensor, left, base.tensor, right, dtype)
        if start % (_SAMPLED * kernels.BLOCK) == 0:  # of every block it would cost more than the subtraction
            energy = [energy[0] + sampled_energy(out, dtype), energy[1] + sampled_energy(right, base.dtype)]
        base_hash.update(right)
        vector_hash.update(out)
    hashes = {"base": base_hash.hexdigest(), "written": vector_hash.hexdigest()}
    return [hashes | {"differs": int(differs[0]), "energy": energy}]


_SAMPLED = 8  # of so many blocks the first is looked at


def sampled_energy(bits: np.ndarray, dtype: str) -> float:
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
    wider = wider_than(dtype)
    raise DataError(
        f"tensor {base.name!r}: a value of {finetuned.path} or {base.path}, or their difference, is beyond "
        f"the largest {DTYPE_NAMES[dtype]}; {f'extract with --dtype {wider}' if wider else 'is one of them damaged?'}"
    )


def refuse_untied(extra: Tensor, tied: Tensor) -> None:
    """Raise DataError for a spelled-out tensor that is not what the base ties it to."""
    raise DataError(
        f"tensor {extra.name!r} in {extra.path} differs from {tied.name!r}, to which the base ties it; "
        f"take a base that has a head of its own, or leave it out with --skip {escape(extra.name)!r}"
    )


# --- the plan -------------------------------------------------------------------------------------


def open_finetuned(label: str, base: Checkpoint, skip: tuple, vocabulary: str) -> tuple[Checkpoint, Adapter | None]:
    """The fine-tuned side, its weights still on the Hub where they are; and the adapter, where it is one."""
    remote = remote_checkpoint(label)
    directory = remote.path if remote else local_directory(label)
    if not remote and is_adapter(directory):
        adapter = open_adapter(label, directory, base, free_rows=vocabulary == "common")
        return adapter.checkpoint, without(adapter, base, skip)
    return remote or open_checkpoint(label), None


def decide(
    finetuned: Checkpoint, base: Checkpoint, adapter: Adapter | None, parameters: dict
) -> tuple[Extraction, list[str]]:
    """(what is done with every tensor, notes): all that headers, configs and tokenizers decide. parameters: dtype,
    skip, vocabulary."""
    free_rows, common, skip = parameters["vocabulary"] == "common", {}, tuple(parameters["skip"])
    (matched,) = [match_adapter(base, adapter)] if adapter else match_all(base, [finetuned], skip, free_rows)
    notes = list(matched.notes)
    if free_rows:
        vocabulary = common_vocabulary(base, finetuned)
        common = common_elements(base, matched.pairs, vocabulary)
        notes += vocabulary.notes
    products = adapter.products if adapter else {}
    return Extraction(DTYPE_CODES[parameters["dtype"]], matched.pairs, matched.equal, common, products), notes


def plan(finetuned: Checkpoint, base: Checkpoint, by: Extraction, save_path: Path, parameters: dict) -> Job:
    """The job, before a weight is read."""
    check_places([finetuned.path, base.path], [save_path])
    written = [(t.name, by.dtype if t.is_parameter else t.dtype, t.shape) for t in base.tensors.values()]
    shards = plan_shards(written, parameters["max_shard_size"])
    # Tokenizers decide which rows are common, and are not among the files that a job is known by.
    parameters = parameters | {"common": text_hash(json.dumps(sorted(by.common.items())))}
    return Job(
        title="extract",
        identity=identity("extract_task_vector_7b.py", parameters, [finetuned, base], [save_path]),
        outputs=[Output(save_path, tuple(shards))],
        tasks=[Task(slot.name, by.inputs(base.tensors[slot.name]), (slot,), i) for i, slot in slots_of(shards)],
    )


def companion_sources(finetuned: Checkpoint, base: Checkpoint, vocabulary: str) -> list[Checkpoint]:
    """Whose tokenizer and generation config the vector gets, later ones over earlier ones.

    The fine-tuned model's, unless its tokens were left out; what comes without a tokenizer (an adapter, a model as
    save_pretrained alone writes it) has the base's.
    """
    if vocabulary == "common":
        return [base]
    return [finetuned] if has_tokenizer(finetuned.path) else [base, finetuned]


def size_note(finetuned: Checkpoint, base: Checkpoint, records: dict[str, dict]) -> list[str]:
    """A remark where the vector is larger than the base: fine-tuning changes a few percent."""
    vector, own = (sum(record.get("energy", (0, 0))[i] for record in records.values()) for i in (0, 1))
    if vector <= own:
        return []
    times = (vector / own) ** 0.5 if own else float("inf")
    return [
        f"the vector's norm is {times:.1f} times the base's (by a sample); fine-tuning changes a few percent: "
        f"is {finetuned.label} a fine-tuned model of {base.label}?"
    ]


def main(argv=None) -> None:
    args = parse_args(argv)
    if not args.dry_run:
        refuse_existing_outputs([args.save_path], args.overwrite)
    base = describe_checkpoint(args.base_model_path)
    check_floats(base)
    finetuned, adapter = open_finetuned(args.finetuned_model_path, base, tuple(args.skip), args.vocabulary)
    parameters = {name: getattr(args, name) for name in ("dtype", "max_shard_size", "skip", "vocabulary")}
    parameters |= {"adapter": adapter.config if adapter else None}
    by, notes = decide(finetuned, base, adapter, parameters)
    job = plan(finetuned, base, by, args.save_path, parameters)
    for note in notes if group().is_main else ():
        print(f"note: {note}")
    if args.dry_run:
        print(describe(job, [finetuned, base]))
        return
    if finetuned.is_remote or base.is_remote:  # only now that everything fits are they downloaded
        finetuned, base = downloaded(job, [finetuned, base], args.overwrite)
        by, _ = decide(finetuned, base, adapter, parameters)
        job = plan(finetuned, base, by, args.save_path, parameters)
    with begin(job, args.overwrite) as running:
        running.stream(partial(extract_tensor, by=by))
        for _, part, records in running.whole():
            for source in companion_sources(finetuned, base, args.vocabulary):
                copy_companions(source.path, part)
            (part / "config.json").write_text(config_with_dtype(base.config, by.dtype), encoding="utf-8")
            write_task_vector_json(part, finetuned, base, by.dtype, records)
            values = sum(tensor.numel for tensor in base.tensors.values() if tensor.is_parameter)
            differs = sum(record.get("differs", 0) for record in records.values())
            print(f"{differs} of {values} values differ from the base ({100 * differs / max(values, 1):.2f} %)")
            for note in size_note(finetuned, base, records):
                print(f"note: {note}")
    if running.is_main:
        brings_config = [base] if adapter else [finetuned, base]  # an adapter's checkpoint has the base's
        for note in [*config_notes(finetuned, base), *code_notes(*brings_config)]:
            print(f"note: {note}")
        print(f"wrote {args.save_path} ({job.outputs[0].nbytes / 1e9:.3f} GB, {args.dtype})")


if __name__ == "__main__":
    run_and_leave(main)
