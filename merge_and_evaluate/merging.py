"""Merge by recipe: open and compare the models, choose the engine, merge, publish.

`stream` sums tensor by tensor at the speed of a copy, for any architecture; `mergekit` does what does not stream.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from common.errors import DataError
from common.shards import stream
from common.shards.checkpoint import Checkpoint
from common.shards.companions import companion_files
from common.shards.documents import read_record
from common.shards.hashing import file_hash, text_hash
from common.shards.headers import read_headers
from common.shards.job import downloaded, input_files
from common.shards.job import memory_needed as job_memory
from common.shards.matching import match
from common.shards.places import check_disk, check_places, refuse_existing, whole_path
from common.shards.remote import describe_checkpoint, fetch, to_download
from common.shards.verify import MERGE_REPORT as REPORT_NAME
from common.shards.verify import PRUNE_REPORT, hashes_as_recorded, recorded_hashes
from merge_and_evaluate import mergekit_engine
from merge_and_evaluate.card import command
from merge_and_evaluate.recipe_paths import model_paths, with_paths
from merge_and_evaluate.recipes import Recipe, draws
from merge_and_evaluate.streamed_methods import stream_reason

ENGINES = ("auto", "stream", "mergekit")


@dataclass(frozen=True)
class MergeSettings:
    """How it is merged. `engine` and `skip` change the result; `seed` only where a method draws."""

    max_shard_size: int | None = None
    device: str = "cpu"
    seed: int = 0
    engine: str = "auto"
    skip: tuple[str, ...] = ()  # patterns of tensors that keep the base's bits

    def shard_bytes(self, engine: str) -> int:
        """Largest output file: 5 GB by default, but 1 GB for mergekit, which holds one in memory."""
        return self.max_shard_size or (10**9 if engine == "mergekit" else 5 * 10**9)


@dataclass(frozen=True)
class MergePlan:
    """A recipe whose inputs are there and fit together: `nbytes` will be written to `save_path`.

    reason: why mergekit merges; None where it streams. found: what does not depend on the weights, shared by a sweep's
    merges.
    """

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    save_path: Path
    nbytes: int
    reason: str | None = None
    found: dict = field(default_factory=dict, compare=False)
    # {settings: StreamedMerge} of this very plan: not an argument, so that replace() makes a plan that has none yet.
    _streamed: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def engine(self) -> str:
        return "mergekit" if self.reason else "stream"

    @property
    def is_remote(self) -> bool:
        """Whether weights of a model are still on the Hub; fetched() downloads them."""
        return any(checkpoint.is_remote for checkpoint in self.checkpoints)

    def streamed(self, settings: MergeSettings):
        """The plan of a streamed merge (streaming.StreamedMerge), from headers; made once."""
        if settings not in self._streamed:
            self._streamed[settings] = _plan_streamed(self.recipe, self.checkpoints, self.save_path, settings)
        return self._streamed[settings]


# --- plan -----------------------------------------------------------------------------------------


def _plan_streamed(recipe: Recipe, checkpoints: tuple[Checkpoint, ...], save_path: Path, settings: MergeSettings):
    from merge_and_evaluate.streaming import plan_streamed  # numba is slow to import: not for --help

    return plan_streamed(recipe, checkpoints, save_path, settings)


def check_there(recipe: Recipe, path: str) -> None:
    """Refuse a model that is no directory and no Hub id. A missing directory of the chain names the script that makes
    it."""
    if set(path) & set("+@") and not Path(path).is_dir():
        raise DataError(
            f"{recipe.path}: {path!r}: mergekit takes '+' and '@' in a path for a LoRA or a revision, and there is no "
            "such directory; fix the path, or merge the LoRA and download the revision first"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or path.startswith("models/")
    if looks_local and not Path(path).is_dir():
        raise DataError(f"{recipe.path}: model {path} is not there; {_maker(path)}")


def _maker(path: str) -> str:
    """What writes a directory of the README's chain, judged by its name."""
    name = Path(path).name
    if name.startswith("pruned_vector"):
        return "run prune_task_vector_7b.py first (README, 'Sparsification of Task Vectors'), or fix the path"
    if name.endswith("float16"):
        return "run convert_dtype.py first (README, 'Convert dtype'), or fix the path"
    return "download it there, or fix the path"


def mergekit_reason(recipe: Recipe, settings: MergeSettings) -> str | None:
    """Why mergekit is to merge this recipe; None if it streams. Raises DataError where a flag asks for what only the
    other engine does."""
    reason = stream_reason(recipe.config)
    if settings.engine == "stream" and reason:
        raise DataError(f"{recipe.path}: does not stream: {reason}; use --engine auto or mergekit")
    if settings.engine == "mergekit" and not reason:
        reason = "--engine mergekit"
    if settings.skip and reason:
        raise DataError(
            f"{recipe.path}: --skip is for streamed merges, and mergekit merges this: {reason}; leave --skip out"
        )
    return reason


def check_seed(recipes: list[Recipe]) -> None:
    """Refuse a --seed that none of the merges would use."""
    if not any(map(draws, recipes)):
        methods = list(dict.fromkeys(recipe.config["merge_method"] for recipe in recipes))
        own = "; random draws by the `seed` under its recipe's `parameters`" if "random" in methods else ""
        raise DataError(f"--seed: nothing is drawn by it ({', '.join(methods)}){own}; leave --seed out")


def check_same_names(recipe: Recipe, checkpoints: tuple[Checkpoint, ...]) -> None:
    """Refuse models that fit together only under other names: mergekit matches by name."""
    whole, free_rows = checkpoints[0], mergekit_engine.tokenizes(recipe.config)
    for other in checkpoints[1:]:
        for name, theirs in match(whole, other, free_rows=free_rows).pairs.items():
            is_fused = theirs.name not in other.tensors  # a piece of one that is
            if is_fused or (theirs.name != name and theirs.name not in whole.tensors):  # renamed, not tied
                called = "part of a fused tensor" if is_fused else f"called {theirs.name!r}"
                raise DataError(
                    f"{recipe.path}: tensor {name!r} of {whole.label} is {called} in {other.label}, and "
                    "mergekit matches by name; extract and prune it first (the outputs have the base's names)"
                )


def plan_merge(recipe: Recipe, save_path: str | Path, settings: MergeSettings = MergeSettings()) -> MergePlan:
    """Open and compare all inputs from their headers, those of a Hub id there (remote.py). Raises DataError before a
    weight is read or downloaded."""
    for path in model_paths(recipe.config):
        check_there(recipe, path)  # first: no engine merges what is not there
    reason = mergekit_reason(recipe, settings)
    checkpoints = tuple(describe_checkpoint(path) for path in model_paths(recipe.config))
    return _planned(recipe, checkpoints, Path(save_path), settings, reason)


def fetched(merge_plan: MergePlan, settings: MergeSettings, overwrite: bool) -> MergePlan:
    """The same plan with all weights on this machine: what is still on the Hub is downloaded.

    Raises DataError before that if something is at save_path (what is merged there already was merged from files that
    are here), or if there is no room for the download and the output.
    """
    if not merge_plan.is_remote:
        return merge_plan
    inputs = list(merge_plan.checkpoints)
    if merge_plan.reason is None:
        checkpoints = downloaded(merge_plan.streamed(settings).job, inputs, overwrite)
    else:
        refuse_existing(merge_plan.save_path, overwrite)
        check_disk(to_download(inputs) | {merge_plan.save_path: merge_plan.nbytes})
        checkpoints = [fetch(checkpoint) for checkpoint in inputs]
    return _planned(merge_plan.recipe, tuple(checkpoints), merge_plan.save_path, settings, merge_plan.reason)


def _planned(recipe: Recipe, checkpoints: tuple[Checkpoint, ...], output: Path, settings, reason) -> MergePlan:
    check_places([checkpoint.path for checkpoint in checkpoints], [output])
    if reason is None:
        streamed = _plan_streamed(recipe, checkpoints, output, settings)
        merge_plan = MergePlan(recipe, checkpoints, output, streamed.job.outputs[0].nbytes)
        merge_plan._streamed[settings] = streamed
        return merge_plan
    if not mergekit_engine.cuts(recipe.config):
        check_same_names(recipe, checkpoints)
    return MergePlan(recipe, checkpoints, output, mergekit_engine.output_bytes(recipe, checkpoints), reason)


def memory_needed(merge_plan: MergePlan, settings: MergeSettings) -> int:
    """Bytes that the merge holds at its peak, about."""
    if merge_plan.reason is None:
        return job_memory(merge_plan.streamed(settings).job, stream.worker_count())
    return mergekit_engine.memory_needed(merge_plan.checkpoints, settings.shard_bytes("mergekit"))


# --- what was merged ------------------------------------------------------------------------------


def model_digest(checkpoint: Checkpoint) -> str:
    """One hash for a model's weights, config and tokenizer, wherever the directory is; reads all of it."""
    weights = {tensor.path for tensor in checkpoint.tensors.values()}
    files = sorted(weights | {checkpoint.path / "config.json", *companion_files(checkpoint.path)})
    with ThreadPoolExecutor(2) as pool:
        hashes = list(pool.map(file_hash, files))
    listing = [[path.name, digest] for path, digest in zip(files, hashes, strict=True)]
    return text_hash(json.dumps(listing))


def input_digest(checkpoint: Checkpoint, streams: bool) -> str:
    """What tells models apart without reading weights: the hashes that were recorded when they were written, if a
    streamed merge checks the bytes that pass against them, or else their files' sizes and times of last change.

    By the hashes a model that is pruned again to the same bytes is the same, and its scores count.
    """
    known = hashes_as_recorded(checkpoint) if streams else {}  # mergekit does not look at them
    beside = [[path.name, file_hash(path)] for path in companion_files(checkpoint.path)]
    config = text_hash(json.dumps(checkpoint.config, sort_keys=True))
    return text_hash(json.dumps([sorted((known or input_files([checkpoint])).items()), config, beside]))


def input_digests(merge_plan: MergePlan) -> dict[str, str]:
    """{model as the recipe names it: digest}."""
    streams = merge_plan.reason is None
    return {checkpoint.label: input_digest(checkpoint, streams) for checkpoint in merge_plan.checkpoints}


def merge_identity(recipe: Recipe, digests: dict[str, str], settings: MergeSettings) -> str:
    """What decides the merged bytes, as one hash: engine, the recipe's content, the models', a seed that is used.

    However the models are spelled: ./models/x is the directory that its absolute path is.
    """
    reason = mergekit_reason(recipe, settings)
    parts = {
        "engine": ["stream"] if reason is None else ["mergekit", version("mergekit")],
        "recipe": with_paths(recipe.config, _place),
        "models": {_place(model): digest for model, digest in digests.items()},
        **({"seed": settings.seed} if draws(recipe) else {}),
        **({"skip": settings.skip} if settings.skip else {}),
    }
    return text_hash(json.dumps(parts, sort_keys=True, default=str))


def _place(model: str) -> str:
    """Where a model is; of a Hub id that."""
    return whole_path(model) if Path(model).is_dir() else model


def origin(recipe: Recipe, digests: dict[str, str], settings: MergeSettings) -> dict:
    """How a model was merged, for the files beside it and its scores."""
    method = recipe.config["merge_method"]
    return {
        "recipe_path": recipe.path,
        "recipe": recipe.text,
        "method": method,
        "models": digests,
        **({"seed": settings.seed} if draws(recipe) else {}),
        **({"skip": list(settings.skip)} if settings.skip else {}),
        "command": command(),
    }


_PRUNED = ("pruning_method", "n", "m", "density", "conflict_aware", "rescale", "position", "order", "totals", "kinds")


def pruned_before(checkpoints: tuple[Checkpoint, ...]) -> list[dict]:
    """What prune_task_vector_7b.py did to those of a merge's models that it wrote: from prune_report.json beside
    them."""
    found = []
    for checkpoint in checkpoints:
        report = checkpoint.path / PRUNE_REPORT
        content = read_record(report) if report.is_file() else {}
        if all(key in content for key in ("pruning_method", "order", "position", "totals")):
            found.append({"model": checkpoint.label, **{key: content.get(key) for key in _PRUNED}})
    return found


def already_merged(save_path: Path, identity: str) -> bool:
    """Whether `save_path` holds the complete result of this merge: by its report and, of the weights, their headers."""
    path = save_path / REPORT_NAME
    report = read_record(path) if path.is_file() else {}
    if report.get("identity") != identity:
        return False
    try:
        return {tensor.name for tensor in read_headers(save_path) or ()} >= recorded_hashes(path).keys()
    except DataError:  # a file of several is gone, or was cut short: nothing to go on with
        return False


# --- merge ----------------------------------------------------------------------------------------


def merge(merge_plan: MergePlan, digests: dict[str, str], settings: MergeSettings, overwrite: bool) -> bool:
    """Merge and publish under save_path -> whether this is the process that did."""
    made = origin(merge_plan.recipe, digests, settings)
    made = {"identity": merge_identity(merge_plan.recipe, digests, settings), **made}
    made["vectors"] = pruned_before(merge_plan.checkpoints)
    if merge_plan.reason is None:
        from merge_and_evaluate.streaming import run_streamed

        return run_streamed(merge_plan.streamed(settings), made, overwrite, merge_plan.found)
    mergekit_engine.merge(merge_plan, made, settings, overwrite)
    return True
