"""Can transformers load what is to be scored? Asked before a merge, not found out after it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import DataError, reason_of
from common.shards.architecture import quiet_transformers
from common.shards.checkpoint import Checkpoint, config_with_dtype
from common.shards.companions import copy_companions, has_tokenizer, without_code
from merge_and_evaluate.eval_machine import TRANSFORMERS
from merge_and_evaluate.eval_recipes import EvalRecipe


def check_loadable(
    recipe: EvalRecipe, models: list[Checkpoint], is_merged: bool, makes_tokenizer: bool = False
) -> None:
    """DataError if transformers does not know the architecture, or cannot load the tokenizer, of the model that is
    scored.

    models: of a merge its inputs, base first (whose config the merged model has, and the first of whose tokenizers);
    else the model itself. makes_tokenizer: the merge recipe has another tokenizer made.
    """
    if recipe.backend not in TRANSFORMERS:
        return
    runs_code = bool(recipe.model_args.get("trust_remote_code"))
    _check_architecture(models[0], is_merged, runs_code)
    donor = next((model for model in models if has_tokenizer(model.path)), None)
    if donor and not makes_tokenizer and "tokenizer" not in recipe.model_args:
        _check_tokenizer(donor, models[0], is_merged, runs_code)


def _check_architecture(model: Checkpoint, is_merged: bool, runs_code: bool) -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = model.config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    # Code beside the model is not copied, so a merged one has what names a Hub repository alone.
    config = without_code(model.config) if is_merged else model.config
    if runs_code and "auto_map" in config:
        return
    brings = ", and needs code of its own (auto_map), which is never run here" if "auto_map" in model.config else ""
    instead = "merge alone with --merge_only, or take" if is_merged else "take"
    raise DataError(
        f"{model.label}: config.json has the model_type {model_type!r:.60}, which transformers {__version__} does not "
        f"know{brings}; it cannot be scored: {instead} a version of the model that transformers knows"
    )


def _check_tokenizer(donor: Checkpoint, whole: Checkpoint, is_merged: bool, runs_code: bool) -> None:
    """Load it from files as they will lie beside the merged model: without names of code that is not copied."""
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="tokenizer_") as place:
        directory = Path(place) if is_merged else donor.path
        if is_merged:
            copy_companions(donor.path, directory)
            (directory / "config.json").write_text(config_with_dtype(whole.config, None), encoding="utf-8")
        try:
            with quiet_transformers():
                AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=runs_code)
        except Exception as error:  # files from anyone, and tokenizers fail in as many ways as there are kinds
            reason = reason_of(error).replace(str(directory), donor.label)
            raise DataError(
                f"{donor.label}: its tokenizer cannot be loaded, and scoring needs one ({reason:.200}); copy the "
                "tokenizer's files there again, or give another with --model_args tokenizer=…"
            ) from None
