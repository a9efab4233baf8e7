"""Merge by recipe with mergekit: plan, merge, check, publish.

mergekit writes; what it wrote appears under its final name once every tensor was read back and found
finite. merge_report.json beside it records recipe, inputs and a hash of every tensor.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from common.errors import DataError
from common.shards.checkpoint import Checkpoint, companion_files, copy_companions, open_checkpoint
from common.shards.documents import read_json, write_json
from common.shards.hashing import file_hash, tensor_hashes, text_hash
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES, FLOAT_DTYPES, Tensor, read_headers
from common.shards.layout import tensor_bytes
from common.shards.matching import match
from common.shards.places import check_disk, check_places
from common.shards.staging import staged_directory
from common.shards.verify import MERGE_REPORT as REPORT_NAME
from merge_and_evaluate.recipes import Recipe, model_paths, with_paths

TOKEN_KEYS = ("tokenizer", "tokenizer_source", "chat_template")  # with one of these mergekit makes it
EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


@dataclass(frozen=True)
class MergePlan:
    """A recipe whose inputs are there and fit together: `nbytes` will be written to `save_path`."""

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    save_path: Path
    nbytes: int


@dataclass(frozen=True)
class MergeSettings:
    """How mergekit runs: none of it changes what a deterministic method computes on one device."""

    max_shard_size: int = 10**9
    device: str = "cpu"
    seed: int = 0


# --- plan -----------------------------------------------------------------------------------------


def open_model(recipe: Recipe, path: str) -> Checkpoint:
    """A model of the recipe, its headers read. A missing directory of the chain names the script that makes it."""
    if "@" in path or "+" in path:
        raise DataError(
            f"{recipe.path}: {path!r}: mergekit takes '+' and '@' in a path for a LoRA or a revision; "
            "rename the directory, or merge the LoRA and download the revision first"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or path.startswith("models/")
    if looks_local and not Path(path).is_dir():
        raise DataError(f"{recipe.path}: model {path} is not there; {_maker(path)}")
    return open_checkpoint(path)


def _maker(path: str) -> str:
    """What writes a directory of the README's chain, judged by its name."""
    name = Path(path).name
    if name.startswith("pruned_vector"):
        return "run prune_task_vector_7b.py first (README, 'Sparsification of Task Vectors'), or mend the path"
    if name.endswith("float16"):
        return "run convert_dtype.py first (README, 'Convert dtype'), or mend the path"
    return "download it there, or mend the path"


def _check_match(recipe: Recipe, checkpoints: tuple[Checkpoint, ...]) -> None:
    """Same tensors, same shapes in all models, where the recipe neither cuts layers nor remaps tokens."""
    reshaping = {"slices", "modules", "tokenizer", "tokenizer_source"} & recipe.config.keys()
    for other in checkpoints[1:] if not reshaping else ():
        for name, theirs in match(checkpoints[0], other).pairs.items():
            if theirs.name != name and theirs.name not in checkpoints[0].tensors:  # renamed, not tied
                raise DataError(
                    f"{recipe.path}: tensor {name!r} of {checkpoints[0].label} is called {theirs.name!r} in {other.label}, and "
                    "mergekit matches by name; extract and prune it first (the outputs have the base's names)"
                )


def _output_bytes(recipe: Recipe, model: Checkpoint) -> int:
    """Bytes of the merged tensors: the first model's shapes in the recipe's output dtype."""
    code = DTYPE_CODES.get(recipe.config.get("out_dtype") or recipe.config.get("dtype"))
    return sum(
        tensor_bytes(code if code and tensor.is_parameter else tensor.dtype, tensor.shape)
        for tensor in model.tensors.values()
    )


def plan_merge(recipe: Recipe, save_path: str) -> MergePlan:
    """Open and compare all inputs from their headers. Raises DataError before a weight is read."""
    checkpoints = tuple(open_model(recipe, path) for path in model_paths(recipe.config))
    _check_match(recipe, checkpoints)
    output = Path(save_path)
    check_places([checkpoint.path for checkpoint in checkpoints], [output])
    return MergePlan(recipe, checkpoints, output, _output_bytes(recipe, checkpoints[0]))


# --- what was merged ------------------------------------------------------------------------------


def model_digest(checkpoint: Checkpoint) -> str:
    """One hash for a model's weights, config and tokenizer, wherever the directory lies."""
    weights = {tensor.path for tensor in checkpoint.tensors.values()}
    files = sorted(weights | {checkpoint.path / "config.json", *companion_files(checkpoint.path)})
    with ThreadPoolExecutor(2) as pool:
        hashes = list(pool.map(file_hash, files))
    listing = [[path.name, digest] for path, digest in zip(files, hashes, strict=True)]
    return text_hash(json.dumps(listing))


def input_digests(merge_plan: MergePlan) -> dict[str, str]:
    """{model as the recipe names it: digest}; reads every input once."""
    return {checkpoint.label: model_digest(checkpoint) for checkpoint in merge_plan.checkpoints}


def merge_identity(recipe: Recipe, digests: dict[str, str], settings: MergeSettings) -> str:
    """What decides the merged bytes, as one hash: the recipe's content, the models' content, the seed."""
    parts = {
        "recipe": recipe.config,
        "models": digests,
        "seed": settings.seed,
        "mergekit": version("mergekit"),
    }
    return text_hash(json.dumps(parts, sort_keys=True, default=str))


def origin(recipe: Recipe, digests: dict[str, str], settings: MergeSettings) -> dict:
    """How a model was merged, for the files that lie beside it and its scores."""
    return {"recipe_path": recipe.path, "recipe": recipe.text, "models": digests, "seed": settings.seed}


def already_merged(save_path: Path, identity: str) -> bool:
    """Whether `save_path` holds the whole result of this very merge."""
    report = save_path / REPORT_NAME
    return report.is_file() and read_json(report).get("identity") == identity


# --- merge ----------------------------------------------------------------------------------------


def _local_config(merge_plan: MergePlan) -> dict:
    """The recipe's config with directories only: given a Hub id, mergekit would ask the Hub again."""
    models = {model.label: model for model in merge_plan.checkpoints}
    return with_paths(merge_plan.recipe.config, lambda p: p if Path(p).is_dir() else str(models[p].path))


def _run_mergekit(merge_plan: MergePlan, directory: Path, settings: MergeSettings) -> None:
    """Let mergekit write the merge into an empty directory. Raises DataError with mergekit's own reason."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from merge_and_evaluate.merge_methods import register

    register()
    recipe = merge_plan.recipe
    options = MergeOptions(
        out_shard_size=settings.max_shard_size,
        device=settings.device,
        random_seed=settings.seed,
        copy_tokenizer=any(recipe.config.get(key) for key in TOKEN_KEYS),
    )
    try:
        run_merge(MergeConfiguration.model_validate(_local_config(merge_plan)), str(directory), options, recipe.text)
    except DataError:
        raise
    except Exception as error:  # mergekit raises many types, and all mean the same to the user
        if isinstance(error, OSError) and error.errno:  # a full disk and its like have their own line
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{recipe.path}: mergekit could not merge: {reason:.300}") from error
    finally:  # mergekit keeps open files and guesses by path for the life of the process
        LoaderCache().loaders.clear()
        infer_architecture_info.cache_clear()


def count_not_finite(dtype: str, bits) -> int:
    """How many values of a block of bits are NaN or infinite: those whose exponent bits are all set."""
    from common.pruners import kernels

    exponent = EXPONENT_BITS.get(dtype)
    if exponent is None or (dtype in FLOAT_DTYPES and kernels.all_finite(bits, dtype)):
        return 0
    return int((bits & exponent == exponent).sum())


def check_merged(directory: Path, recipe: Recipe) -> dict[str, str]:
    """{tensor: hash} of what mergekit wrote. Raises DataError if a value is NaN or infinite."""
    tensors = read_headers(directory)
    if not tensors:
        raise DataError(f"{recipe.path}: mergekit wrote no tensors to {directory}; mend the recipe")
    broken = {tensor.name: 0 for tensor in tensors}

    def look(tensor: Tensor, bits) -> None:
        broken[tensor.name] += count_not_finite(tensor.dtype, bits)

    hashes = tensor_hashes(tensors, "check the merge", look)
    for tensor in tensors:
        if broken[tensor.name]:
            raise DataError(
                f"tensor {tensor.name!r} of the merge by {recipe.path} has {broken[tensor.name]} values that are NaN "
                f"or infinite in {DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}; lower the weights, or set "
                "out_dtype: bfloat16 or float32 in the recipe"
            )
    return hashes


def _name_card(directory: Path, name: str) -> None:
    """mergekit's model card takes its title from the directory it wrote to."""
    card = directory / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(f"# {directory.name}", f"# {name}", 1), encoding="utf-8")


def _add_tokenizer(directory: Path, merge_plan: MergePlan) -> None:
    """Tokenizer and generation config of the base, or of the first model that has one, unless mergekit wrote one."""
    if any(directory.glob("tokenizer*")):
        return
    asked = [key for key in TOKEN_KEYS if merge_plan.recipe.config.get(key)]
    if asked:
        raise DataError(
            f"{merge_plan.recipe.path}: mergekit could not make the tokenizer that `{asked[0]}` asks for "
            "(its reason is above); mend the recipe"
        )
    donor = next((model.path for model in merge_plan.checkpoints if any(model.path.glob("tokenizer*"))), None)
    if donor:
        copy_companions(donor, directory)


def merge(merge_plan: MergePlan, digests: dict[str, str], settings: MergeSettings, overwrite: bool) -> None:
    """Merge into `<save_path>.part`, check every tensor, publish under save_path."""
    recipe = merge_plan.recipe
    with staged_directory(merge_plan.save_path, overwrite) as part:
        check_disk({merge_plan.save_path: merge_plan.nbytes})
        _run_mergekit(merge_plan, part, settings)
        _name_card(part, merge_plan.save_path.name)
        _add_tokenizer(part, merge_plan)
        report = {
            "identity": merge_identity(recipe, digests, settings),
            **origin(recipe, digests, settings),
            "mergekit": version("mergekit"),
            "tensors": check_merged(part, recipe),
        }
        write_json(part / REPORT_NAME, report)


def memory_needed(merge_plan: MergePlan, settings: MergeSettings) -> int:
    """Bytes that mergekit holds at its peak, about: one output shard, and one tensor of each model in float32."""
    largest = max(tensor.numel for tensor in merge_plan.checkpoints[0].tensors.values())
    return settings.max_shard_size + 4 * largest * (len(merge_plan.checkpoints) + 2)
