"""Merge with mergekit, what a streamed merge does not do: it writes, every tensor is read back, then it is published.

mergekit knows a model by its architecture and silently drops what it does not know: what is missing is refused.
"""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from common.errors import DataError, reason_of
from common.shards.checkpoint import Checkpoint
from common.shards.companions import copy_companions, has_tokenizer
from common.shards.documents import write_json
from common.shards.hashing import tensor_hashes
from common.shards.headers import DTYPE_CODES, DTYPE_NAMES, FLOAT_DTYPES, Tensor, read_headers
from common.shards.layout import tensor_bytes
from common.shards.matching import mask_names, row_axis, vocabulary_names
from common.shards.places import check_disk
from common.shards.staging import staged_directory
from common.shards.verify import MERGE_REPORT
from merge_and_evaluate.card import write_card
from merge_and_evaluate.recipe_paths import explicit_path, with_paths
from merge_and_evaluate.recipes import Recipe
from merge_and_evaluate.streamed_methods import model_path

TOKENIZING = ("tokenizer", "tokenizer_source")  # with one of these embeddings and head get other rows
TOKEN_KEYS = (*TOKENIZING, "chat_template")  # with one of these mergekit writes the tokenizer itself
CUTTING = ("slices", "modules")  # with one of these the output has other layers than the base
EXPONENT_BITS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}


def cuts(config: dict) -> bool:
    """Whether a recipe's output has other layers than the base: `slices: null` says nothing, so values count."""
    return any(config.get(key) for key in CUTTING)


def tokenizes(config: dict) -> bool:
    """Whether a recipe has the rows of embeddings and head arranged for another tokenizer; `tokenizer: {}` does."""
    return any(config.get(key) is not None for key in TOKENIZING)


# --- merge ----------------------------------------------------------------------------------------


def _local_config(merge_plan) -> dict:
    """The recipe's config with directories only: given a Hub id, mergekit would ask the Hub again."""
    models = {model.label: model for model in merge_plan.checkpoints}
    return with_paths(merge_plan.recipe.config, lambda p: explicit_path(p if Path(p).is_dir() else str(models[p].path)))


def _run_mergekit(merge_plan, directory: Path, settings) -> None:
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
        out_shard_size=settings.shard_bytes("mergekit"),
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
        reason = reason_of(error)
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
        raise DataError(f"{recipe.path}: mergekit wrote no tensors to {directory}; fix the recipe")
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


def _add_tokenizer(directory: Path, merge_plan) -> None:
    """Tokenizer and generation config of the base, or of the first model that has one, unless mergekit wrote one."""
    if has_tokenizer(directory):
        return
    asked = [key for key in TOKEN_KEYS if merge_plan.recipe.config.get(key)]
    if asked:
        raise DataError(
            f"{merge_plan.recipe.path}: mergekit could not make the tokenizer that `{asked[0]}` asks for "
            "(its reason is above); fix the recipe"
        )
    donor = next((model.path for model in merge_plan.checkpoints if has_tokenizer(model.path)), None)
    if donor:
        copy_companions(donor, directory)


def merge(merge_plan, made: dict, settings, overwrite: bool) -> None:
    """Merge into `<save_path>.part`, check every tensor, publish under save_path."""
    with staged_directory(merge_plan.save_path, overwrite) as part:
        check_disk({merge_plan.save_path: merge_plan.nbytes})
        _run_mergekit(merge_plan, part, settings)
        hashes = check_merged(part, merge_plan.recipe)
        check_complete(part, merge_plan)
        _add_tokenizer(part, merge_plan)
        report = {**made, "engine": "mergekit", "mergekit": version("mergekit"), "hash": "xxh3_128", "tensors": hashes}
        write_json(part / MERGE_REPORT, report)
        write_card(part, merge_plan.save_path.name, report)


def check_complete(directory: Path, merge_plan) -> None:
    """Raise DataError unless every tensor of the first model is there with its shape, if the recipe keeps the layers.

    A tied head may be left out, and with another tokenizer embeddings and head may have other rows. mergekit exits with
    0 even when it dropped tensors, so only here does that show.
    """
    config, whole = merge_plan.recipe.config, merge_plan.checkpoints[0]
    if cuts(config):
        return
    written = {tensor.name: tensor.shape for tensor in read_headers(directory)}
    free = vocabulary_names(whole, whole.tensors) if tokenizes(config) else set()
    tied = mask_names(whole)
    missing = [
        tensor.name
        for tensor in whole.tensors.values()
        if tensor.is_parameter
        and tied[tensor.name] == tensor.name
        and not (tensor.name in written and _same_shape(tensor, written[tensor.name], tensor.name in free))
    ]
    if missing:
        # By kind: of 32 layers one line says more than 32.
        patterns = Counter(re.sub(r"\d+", "*", name) for name in missing)
        some = ", ".join(f"{pattern} ({count})" for pattern, count in patterns.most_common(4))
        raise DataError(
            f"{merge_plan.recipe.path}: mergekit left out {len(missing)} of {len(whole.tensors)} tensors of "
            f"{whole.label}, or changed their shape: {some}{' and more' if len(patterns) > 4 else ''}; it does not "
            "know this architecture: use a method that streams (--engine stream)"
        )


def _same_shape(tensor: Tensor, shape: tuple[int, ...], free_rows: bool) -> bool:
    """Whether a tensor has this shape; with free_rows whatever its number of rows."""
    if not free_rows:
        return tensor.shape == shape
    axis = row_axis(tensor.shape)
    mine, theirs = (each[:axis] + each[axis + 1 :] for each in (tensor.shape, tuple(shape)))
    return mine == theirs and len(tensor.shape) == len(shape)


def output_bytes(recipe: Recipe, checkpoints: tuple[Checkpoint, ...]) -> int:
    """Bytes of the merged tensors: the first model's shapes in the recipe's output dtype, or its slices' layers."""
    code = DTYPE_CODES.get(recipe.config.get("out_dtype") or recipe.config.get("dtype"))

    def size(tensor: Tensor) -> int:
        return tensor_bytes(code if code and tensor.is_parameter else tensor.dtype, tensor.shape)

    slices = recipe.config.get("slices")
    if not slices:
        return sum(size(tensor) for tensor in checkpoints[0].tensors.values())
    by_name = {checkpoint.label: checkpoint for checkpoint in checkpoints}
    total = sum(size(tensor) for tensor in checkpoints[0].tensors.values() if layer_of(tensor.name) is None)
    for part in slices:
        source = part["sources"][0]
        layers = range(*map(int, source["layer_range"]))  # ["0", "2"] is a range to mergekit
        model = by_name.get(model_path(source["model"]), checkpoints[0])
        total += sum(size(tensor) for tensor in model.tensors.values() if layer_of(tensor.name) in layers)
    return total


def layer_of(name: str) -> int | None:
    """The number of a tensor's layer: layer_of("model.layers.3.mlp.up_proj.weight") -> 3; None outside the layers."""
    found = re.search(r"\.(\d{1,9})\.", name)
    return int(found[1]) if found else None


def memory_needed(checkpoints: tuple[Checkpoint, ...], max_shard_size: int) -> int:
    """Bytes that mergekit holds at its peak, about: one output shard, and one tensor of each model in float32."""
    largest = max(tensor.numel for tensor in checkpoints[0].tensors.values())
    return max_shard_size + 4 * largest * (len(checkpoints) + 2)
