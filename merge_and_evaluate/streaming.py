"""A streamed merge: every decision from headers, then one job (common.shards.job), like the first three scripts.

By names alone, for any architecture: the output has the tensors of the base (for `linear` without a base, of the
first model), each with its shape, and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import DataError
from common.pruners import report
from common.shards import stream
from common.shards.checkpoint import Checkpoint, config_with_dtype
from common.shards.companions import copy_companions, has_tokenizer
from common.shards.documents import write_json
from common.shards.dtypes import check_floats
from common.shards.hashing import text_hash
from common.shards.headers import Tensor
from common.shards.job import Job, begin, identity
from common.shards.layout import Output, plan_shards, slots_of
from common.shards.matching import Match, mask_names, match_all
from common.shards.memory import MemorySink
from common.shards.stream import Task, Worker, same_bytes
from common.shards.verify import MERGE_REPORT, recorded_hashes_of
from merge_and_evaluate.card import write_card
from merge_and_evaluate.merge_tensor import Found, TensorMerge, merge_tensor
from merge_and_evaluate.parameters import layer_depths, parameters_of, written_dtype
from merge_and_evaluate.recipe_paths import with_paths
from merge_and_evaluate.recipes import Recipe, draws
from merge_and_evaluate.streamed_methods import OURS, model_path, summed_models

# Elements. nm with an m of its own for each model is ranked in blocks of a common multiple of them, and a block is in
# memory for every model at once.
LARGEST_GROUP = 1 << 24


@dataclass(frozen=True)
class StreamedMerge:
    """What is decided: the job, and how each tensor is merged (one that is not in `how` is carried over).

    `whole` lends names and config.
    """

    job: Job
    whole: Checkpoint
    models: tuple[Checkpoint, ...]
    how: dict[str, TensorMerge]
    equal: dict[str, list[tuple[Tensor, Tensor]]]
    recorded: dict[str, dict[str, str]]  # {label of a model: {tensor: hash}}, where an earlier step left them
    notes: tuple[str, ...]  # what was resolved: other names, ties, constants

    @property
    def one_dtype(self) -> str | None:
        """What all tensors that are merged are written in; None where they differ. The config says it.

        What --skip leaves out is converted when the model is loaded: of the two dtypes the merge's is kept whole.
        """
        dtypes = {how.dtype for how in self.how.values()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def sources(self, task: Task) -> list[Checkpoint]:
        """The model that each input of a task is from."""
        if task.name not in self.how:
            return [self.whole]
        return [*self.models] if self.how[task.name].method == "linear" else [self.whole, *self.models]


def plan_streamed(recipe: Recipe, checkpoints: tuple[Checkpoint, ...], save_path: Path, settings) -> StreamedMerge:
    """Everything decided before a weight is read. `checkpoints` are labelled as the recipe names them."""
    by_name = {checkpoint.label: checkpoint for checkpoint in checkpoints}
    models = tuple(by_name[path] for path in summed_models(recipe.config))
    base = model_path(recipe.config.get("base_model"))
    whole = by_name[base] if base else models[0]
    check_floats(whole)
    matches = match_all(whole, list(models), settings.skip)
    inputs = inputs_of(recipe, whole, [matched.pairs for matched in matches])
    if not inputs:
        raise DataError(f"{recipe.path}: --skip leaves nothing to merge; leave out a pattern")
    ties = mask_names(whole)
    how = how_merged(recipe, whole, inputs, ties, settings.seed)
    check_ties(recipe, how, ties)
    check_groups(recipe, how)
    written = [(t.name, how[t.name].dtype if t.name in how else t.dtype, t.shape) for t in whole.tensors.values()]
    shards = plan_shards(written, settings.shard_bytes("stream"))
    # Resolved paths: the same merge under another spelling resumes the same job.
    paths = with_paths(recipe.config, lambda path: str(by_name[path].path) if path in by_name else path)
    parameters = {"recipe": paths, "max_shard_size": settings.shard_bytes("stream")}
    parameters |= {"seed": settings.seed} if draws(recipe) else {}
    parameters |= {"skip": settings.skip} if settings.skip else {}
    job = Job(
        title=f"merge {recipe.config['merge_method']}",
        identity=identity("merge_and_evaluate_7b.py", parameters, list(checkpoints), [save_path]),
        outputs=[Output(save_path, tuple(shards))],
        tasks=[
            Task(slot.name, inputs.get(slot.name, (whole.tensors[slot.name],)), (slot,), i)
            for i, slot in slots_of(shards)
        ],
        passes=2 if any(each.reads_twice for each in how.values()) else 1,
    )
    notes = tuple(dict.fromkeys(note for matched in matches for note in matched.notes))
    recorded = {checkpoint.label: recorded_hashes_of(checkpoint) for checkpoint in checkpoints}
    return StreamedMerge(job, whole, models, how, tied_copies(matches), recorded, notes)


def inputs_of(recipe: Recipe, whole: Checkpoint, pairs: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, ...]]:
    """{tensor that is merged: what it is merged from}: the base's own, unless `linear`, then each model's."""
    is_linear = recipe.config["merge_method"] == "linear"
    return {
        own.name: (() if is_linear else (own,)) + tuple(each[own.name] for each in pairs)
        for own in whole.tensors.values()
        # A parameter without a pair was left out with --skip, or is of no use to the architecture: it is carried over.
        if own.is_parameter and all(own.name in each for each in pairs)
    }


def how_merged(
    recipe: Recipe, whole: Checkpoint, inputs: dict, ties: dict[str, str], seed: int
) -> dict[str, TensorMerge]:
    """How each tensor of `inputs` is merged: the recipe's values for it, the dtype written, the name its draws go by.

    ties: {tensor: first of its tie group}, as mask_names() says.
    """
    method = recipe.config["merge_method"]
    dtypes = {name: written_dtype(recipe.config, [tensor.dtype for tensor in read]) for name, read in inputs.items()}
    # Of all tensors: where a layer is in its stack cannot be told without those that --skip leaves out.
    depths = layer_depths(whole.tensors)
    return {
        name: TensorMerge(method, values, dtypes[name], ties[name], seed)
        for name, values in parameters_of(recipe, inputs, depths).items()
    }


def tied_copies(matches: list[Match]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """{tensor: (a model's other spelling of it, that model's own)}, which have to be equal where the base ties them."""
    copies: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for matched in matches:
        for name, extras in matched.equal.items():
            copies.setdefault(name, []).extend((extra, matched.pairs[name]) for extra in extras)
    return copies


def check_ties(recipe: Recipe, how: dict[str, TensorMerge], ties: dict[str, str]) -> None:
    """Refuse to merge tensors that the config ties, each of them stored, in different ways: loaded they are one."""
    for name, first in ties.items():
        mine, theirs = how.get(name), how.get(first)
        if mine != theirs and (mine is None or theirs is None or mine.values != theirs.values):
            raise DataError(
                f"{recipe.path}: tensor {name!r} is tied to {first!r} and would be merged differently; give both the "
                "same `parameters`, and leave out both with --skip or neither"
            )


def check_groups(recipe: Recipe, how: dict[str, TensorMerge]) -> None:
    """Refuse n:m whose m differ so that a block would be too large for the memory that is promised."""
    for name, each in how.items():
        if each.method == "cabs" and each.common_group > LARGEST_GROUP:
            ms = " and ".join(str(model["m"]) for model in each.values.models)
            raise DataError(
                f"{recipe.path}: tensor {name!r}: m is {ms}, whose least common multiple is {each.common_group}, "
                f"at most {LARGEST_GROUP} are ranked together; take multiples of one another"
            )


# --- the job --------------------------------------------------------------------------------------


def merge_and_check(task: Task, worker: Worker, merge: StreamedMerge, found: dict[str, Found]) -> list[dict]:
    """One tensor, its inputs compared with the hashes that earlier steps recorded beside them."""
    for head, embedding in merge.equal.get(task.name, ()):
        if not same_bytes(worker, head, embedding):
            raise DataError(
                f"tensor {head.name!r} in {head.path} differs from {embedding.name!r}, to which the base ties it; "
                "take a base that has a head of its own"
            )
    (record,) = merge_tensor(task, worker, merge.how.get(task.name), found.setdefault(task.name, Found()))
    hashes = record.get("inputs") or [record["base"]]
    for tensor, source, digest in zip(task.inputs, merge.sources(task), hashes, strict=True):
        if merge.recorded[source.label].get(tensor.name, digest) != digest:
            raise DataError(
                f"tensor {tensor.name!r} in {tensor.path}: not the bytes that were recorded when it was written; "
                "write or copy the directory again"
            )
    return [record]


def run_streamed(merge: StreamedMerge, origin: dict, overwrite: bool, found: dict[str, Found]) -> bool:
    """Merge, or resume; publish with config, tokenizer, merge_report.json and model card -> whether by this process."""
    with begin(merge.job, overwrite) as running:
        for note in merge.notes if running.is_main else ():
            print(f"note: {note}", flush=True)
        running.stream(partial(merge_and_check, merge=merge, found=found))
        for _, part, records in running.whole():
            finish(part, merge, origin, records)
    return running.is_main


def run_in_memory(merge: StreamedMerge, tensors: Mapping[str, object], found: dict[str, Found], title: str) -> None:
    """Merge into the tensors of a loaded model, {name: torch.Tensor}: the bits that run_streamed would write.

    In the tensors' own dtype. Every tensor is computed from the inputs anew, whatever it held before; buffers stay as
    they are.
    """
    tasks = [task for task in merge.job.tasks if task.name in merge.how]
    do = partial(merge_and_check, merge=merge, found=found)
    with stream.progress(title, sum(task.nbytes for task in tasks)) as moved:
        stream.run(tasks, do, moved, stream.worker_count(), MemorySink(tensors))


def write_companions(directory: Path, merge: StreamedMerge) -> None:
    """Put there what the weights need beside them: config.json, the tokenizer."""
    donor = next((c for c in (merge.whole, *merge.models) if has_tokenizer(c.path)), merge.whole)
    copy_companions(donor.path, directory)
    text = config_with_dtype(merge.whole.config, merge.one_dtype)
    (directory / "config.json").write_text(text, encoding="utf-8")


def finish(part: Path, merge: StreamedMerge, origin: dict, records: dict[str, dict]) -> None:
    """The files beside the weights."""
    write_companions(part, merge)
    content = {
        **origin,
        "engine": "stream",
        "inputs": input_hashes(merge, records),
        "vectors": vector_figures(merge, records) or origin.get("vectors", []),
        "hash": "xxh3_128",
        "tensors": {name: record["written"] for name, record in records.items()},
    }
    write_json(part / MERGE_REPORT, content)
    write_card(part, merge.job.outputs[0].final.name, content)


def input_hashes(merge: StreamedMerge, records: dict[str, dict]) -> dict[str, str]:
    """{model: one hash of all its tensors that were read}, from what passed by."""
    found: dict[str, list] = {}
    for task in merge.job.tasks:
        record = records[task.name]
        for source, digest in zip(merge.sources(task), record.get("inputs") or [record["base"]], strict=True):
            found.setdefault(source.label, []).append([task.name, digest])
    return {label: text_hash(json.dumps(passed)) for label, passed in found.items()}


def vector_figures(merge: StreamedMerge, records: dict[str, dict]) -> list[dict]:
    """For our methods, what each task vector's pruning did: totals and kinds of tensors as in prune_report.json."""
    if next(iter(merge.how.values())).method not in OURS:
        return []
    labels, figures = [model.label for model in merge.models], []
    for j, label in enumerate(labels):
        own = {
            name: {"written": record["written"], **({"tally": record["tallies"][j]} if "tallies" in record else {})}
            for name, record in records.items()
        }
        built = report.build({}, labels, j, own)
        figures.append({"model": label, "order": labels} | {key: built[key] for key in ("position", "totals", "kinds")})
    return figures
