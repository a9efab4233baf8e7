"""Candidates that are scored without being written: one loaded model, into whose tensors each merge is streamed.

A merge is computed from the base and the models anew each time, never added to what is there, so the weights that are
scored are bit for bit those that writing and loading the merged model would give.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import DataError, reason_of
from common.shards.hashing import file_hash
from common.shards.headers import DTYPE_BYTES, DTYPE_CODES
from merge_and_evaluate.eval_machine import TRANSFORMERS, on_this_machine
from merge_and_evaluate.eval_recipes import EvalRecipe, evaluator_config
from merge_and_evaluate.merging import MergePlan, MergeSettings

# Of the arguments of lm-eval's hf model those that leave the parameters what from_pretrained makes of the file. Others
# (peft, delta, load_in_8bit, gguf_file …) change or replace them, so that filling them would score something else.
PLAIN_ARGS = {
    "dtype",
    "backend",
    "tokenizer",
    "use_fast_tokenizer",
    "truncation",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "trust_remote_code",
    "attn_implementation",
    "softmax_dtype",
    "mixed_precision_dtype",
    "logits_cache",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
    "low_cpu_mem_usage",
}


IN_MEMORY = "candidates are merged into one model in memory; only the chosen one is written"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """lm-eval's model `lm`, whose `tensors` {name: torch.Tensor} are filled; `directory` holds its config and
    tokenizer."""

    lm: object
    directory: Path
    tensors: dict


# --- whether --------------------------------------------------------------------------------------


def written_reason(recipe: EvalRecipe, merge_plan: MergePlan, settings: MergeSettings) -> str | None:
    """Why every candidate has to be written to disk, as far as can be said before a model is loaded; None if none
    has."""
    if merge_plan.reason is not None:
        return f"mergekit merges: {merge_plan.reason}"
    if recipe.backend not in TRANSFORMERS:
        return f"model: {recipe.backend} loads its models itself"
    if others := sorted(recipe.model_args.keys() - PLAIN_ARGS):
        return f"model_args: {others[0]} may change what is loaded"
    if merge_plan.streamed(settings).one_dtype is None:
        return "its tensors are written in several dtypes"
    return None


def fillable(state: dict, parameters: dict, merge) -> tuple[dict, str | None]:
    """({name: tensor to fill}, None), or ({}, why this model cannot be filled name for name).

    state: what a state_dict() gives, tied names included; parameters: {name: parameter}, each once; merge: a
    StreamedMerge.
    """
    shapes = {slot.name: slot.shape for shard in merge.job.outputs[0].shards for slot in shard.slots}
    for name in merge.how:
        if name not in state:
            return {}, f"the loaded model has no tensor {name!r}"
        tensor = state[name]
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point() or not tensor.is_contiguous():
            return {}, f"tensor {name!r} is loaded as {tensor.dtype} {list(tensor.shape)}"
        if tensor.is_meta:
            return {}, f"tensor {name!r} does not fit into memory"
    # By address: nothing else says that two names are one tensor. An empty tensor has no address of its own.
    places = {name: state[name].data_ptr() for name in merge.how if state[name].numel()}
    filled = set(places.values())
    if len(filled) < len(places):
        return {}, "it stores tied tensors twice"
    for name, parameter in parameters.items():
        if parameter.numel() and parameter.data_ptr() not in filled:
            return {}, f"the loaded model's parameter {name!r} is not in the checkpoint"
    return {name: state[name] for name in merge.how}, None


def model_bytes(recipe: EvalRecipe, merge) -> int:
    """Bytes of the loaded model's parameters: in the dtype it is scored in, each tensor of the checkpoint once."""
    wanted = str(recipe.model_args.get("dtype", "auto")).removeprefix("torch.")
    size = DTYPE_BYTES[DTYPE_CODES.get(wanted, merge.one_dtype)]
    slots = [slot for shard in merge.job.outputs[0].shards for slot in shard.slots]
    return sum(slot.nbytes // DTYPE_BYTES[slot.dtype] * size for slot in slots)


# --- load and fill --------------------------------------------------------------------------------


def _furnish(directory: Path, merge) -> None:
    """Make a directory that loads as the merged model will, with the base's weights in it as links."""
    from merge_and_evaluate.streaming import write_companions

    write_companions(directory, merge)
    for path in merge.whole.path.iterdir():
        if path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json"):
            (directory / path.name).symlink_to(path.resolve())


def _load(recipe: EvalRecipe, directory: Path):
    """lm-eval's model of a directory, made as simple_evaluate makes it."""
    from lm_eval.api.registry import get_model

    config = evaluator_config(on_this_machine(recipe, str(directory)), str(directory))
    beside = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    try:
        return get_model(config.model).create_from_arg_obj(config.model_args, beside)
    except Exception as error:  # transformers and what it uses raise many types; the user needs the reason
        raise DataError(f"{recipe.path}: lm-eval could not load the merged model: {reason_of(error):.300}") from error


@contextmanager
def loaded_model(recipe: EvalRecipe, merge_plan: MergePlan, settings: MergeSettings) -> Iterator[tuple]:
    """(LoadedModel, None) of the model that a recipe's merges make, or (None, why each is to be written). One model is
    in memory while this lasts, with the base's weights in it until it is filled."""
    reason = written_reason(recipe, merge_plan, settings)
    if reason:
        yield None, reason
        return
    merge = merge_plan.streamed(settings)
    with TemporaryDirectory(prefix="merged_in_memory_") as place:
        _furnish(Path(place), merge)
        lm = _load(recipe, Path(place))
        tensors, reason = fillable(lm.model.state_dict(), dict(lm.model.named_parameters()), merge)
        if reason:
            del lm  # before the yield: candidates are now written and loaded one by one, and would find no memory
            _free()
            yield None, reason
            return
        try:
            yield LoadedModel(lm, Path(place), tensors), None
        finally:
            del lm, tensors
            _free()


def _free() -> None:
    """Give back what a dropped model held, before another is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fresh(loaded: LoadedModel):
    """lm-eval's model as if it had just been made: `batch_size: auto` finds its sizes anew, for these prompts."""
    if hasattr(loaded.lm, "batch_sizes"):
        loaded.lm.batch_sizes.clear()
    return loaded.lm


@contextmanager
def opened(recipe: EvalRecipe, loaded: LoadedModel | None, directory: str) -> Iterator:
    """lm-eval's model to score: the loaded one, or where there is none that of a directory, for as long as this
    lasts."""
    if loaded:
        yield fresh(loaded)
        return
    lm = _load(recipe, Path(directory))
    try:
        yield lm
    finally:
        del lm
        _free()


def form_of(merge_plan: MergePlan, settings: MergeSettings) -> tuple:
    """What merges must agree in to be scored in one loaded model: the base's shapes, which tensors are merged, and the
    files beside them (config with its dtype, tokenizer), looked at as they will be written rather than worked out
    again."""
    from merge_and_evaluate.streaming import write_companions

    merge = merge_plan.streamed(settings)
    with TemporaryDirectory(prefix="merged_form_") as place:
        write_companions(Path(place), merge)
        files = sorted((path.name, file_hash(path)) for path in Path(place).iterdir() if path.is_file())
    return str(merge.whole.path), frozenset(merge.how), tuple(files)


@contextmanager
def model_loader(
    recipe: EvalRecipe, settings: MergeSettings, keep_models: bool
) -> Iterator[Callable[[MergePlan], LoadedModel | None]]:
    """A function that loads the model into which a merge is streamed, when first called, and says so; None from it
    means that the merge is written to a directory. Merges of one form share the model; for another form, as recipes of
    another base have, it is dropped before the next is loaded: one is in memory at a time."""
    with ExitStack() as stack:
        held: dict[tuple, LoadedModel | None] = {}
        told: set[str] = set()

        def load(merge_plan: MergePlan) -> LoadedModel | None:
            if keep_models:
                return None
            reason = written_reason(recipe, merge_plan, settings)
            form = (reason,) if reason else form_of(merge_plan, settings)
            if form not in held:
                held.clear()  # or the model would stay in memory beside the next
                stack.close()
                held[form], reason = stack.enter_context(loaded_model(recipe, merge_plan, settings))
                _tell(
                    told, f"{merge_plan.recipe.path}: a directory for each candidate: {reason}" if reason else IN_MEMORY
                )
            return held[form]

        try:
            yield load
        finally:
            held.clear()  # likewise beside the one that is reported


def _tell(told: set[str], line: str) -> None:
    if line not in told:
        print(line, flush=True)
        told.add(line)


def fill(loaded: LoadedModel, merge_plan: MergePlan, settings: MergeSettings, title: str) -> None:
    """Stream a merge into the loaded model."""
    from merge_and_evaluate.streaming import run_in_memory

    run_in_memory(merge_plan.streamed(settings), loaded.tensors, merge_plan.found, title)
