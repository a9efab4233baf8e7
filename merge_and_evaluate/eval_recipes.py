"""Eval recipes: read and check lm-eval's YAML config.

It is the file that `lm_eval run --config` takes; lm-eval's own EvaluatorConfig reads it.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common.errors import DataError
from merge_and_evaluate.scores import is_score
from merge_and_evaluate.yaml_files import read_yaml

TEXT_KEYS = ("model", "device", "include_path", "use_cache")
MAPPING_KEYS = ("model_args", "gen_kwargs", "metadata")  # or text like "a=1,b=2"
IGNORED_KEYS = ("config", "output_path", "show_config", "verbosity")  # the script says where results go
BACKEND_PACKAGES = {  # what lm-eval imports only once it makes the model
    "vllm": "vllm",
    "vllm-vlm": "vllm",
    "sglang": "sglang",
    "mamba_ssm": "mamba_ssm",
    "openvino": "optimum",
    "ipex": "optimum",
    "habana": "optimum",
    "neuronx": "optimum",
    "megatron_lm": "megatron",
    "nemo_lm": "nemo",
    "trtllm": "tensorrt_llm",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
    "winml": "onnxruntime_genai",
    "litellm": "litellm",
    "litellm-chat": "litellm",
    "litellm-chat-completions": "litellm",
}
HUB_KEYS = ("wandb_args", "wandb_config_args", "hf_hub_log_args", "trackio_args")


@dataclass(frozen=True)
class EvalRecipe:
    """An eval recipe: `text` as its author wrote it, `config` with the command line's flags worked in."""

    path: str
    text: str
    config: dict

    @property
    def tasks(self) -> list[str]:
        """The tasks and groups it names, in order, each once."""
        tasks = self.config["tasks"]
        names = tasks.split(",") if isinstance(tasks, str) else [n for task in tasks for n in task.split(",")]
        return list(dict.fromkeys(name.strip() for name in names))

    @property
    def backend(self) -> str:
        """lm-eval's name for what loads the model: `model`, transformers where that is left out or empty."""
        return self.config.get("model") or "hf"

    @property
    def model_args(self) -> dict:
        """The recipe's model_args without `pretrained`, which is the model that is scored."""
        return {key: value for key, value in _mapping(self.config.get("model_args")).items() if key != "pretrained"}

    @property
    def samples(self) -> dict[str, list[int]]:
        """{task: numbers of its documents}, the only ones that are scored; {} where the recipe names none."""
        return (self.config.get("samples") and evaluator_config(self, "model").samples) or {}

    @property
    def metadata(self) -> dict:
        """What tasks are told about the job."""
        return {**self.model_args, **_mapping(self.config.get("metadata"))}


def _mapping(value: dict | str | None) -> dict:
    from lm_eval.utils import simple_parse_args_string

    return simple_parse_args_string(value) if isinstance(value, str) else value or {}


def read_eval_recipe(path: str, **flags) -> EvalRecipe:
    """The eval recipe at `path`. A flag that is given wins over the file: device, batch_size, limit, dtype (a key of
    model_args) and model_args ("a=1,b=2", whose keys win one by one). DataError on what lm-eval would ignore or refuse.
    """
    text, config = read_yaml(path)
    check_keys(path, config)
    given = {key: value for key, value in flags.items() if value is not None}
    model_args = _mapping(given.pop("model_args", None)) | {k: given.pop(k) for k in ("dtype",) if k in given}
    if "pretrained" in model_args:  # in the file it may stand, so that `lm_eval run` takes it too
        raise DataError(
            f"--model_args pretrained={model_args['pretrained']}: the model that is scored is --save_path; leave it out"
        )
    config = {**config, **given}
    if model_args:
        config["model_args"] = {**_mapping(config.get("model_args")), **model_args}
    config["include_path"] = include_path(path, config.get("include_path"))
    check_device(config.get("device"))
    recipe = EvalRecipe(path, text, config)
    check_backend(path, recipe.backend)
    try:
        evaluator_config(recipe, "model")
    except (ValueError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        raise DataError(f"{path}: lm-eval refuses it: {' '.join(str(error).split()):.200}; fix the recipe") from None
    check_samples(recipe)
    return recipe


def check_keys(path: str, config: dict) -> None:
    """Refuse unknown keys, and values of a kind that lm-eval would stumble over later."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    known = [key for key in EvaluatorConfig.__dataclass_fields__ if key not in HUB_KEYS]
    for key, value in config.items():
        if key in HUB_KEYS:
            raise DataError(f"{path}: {key!r} is for `lm_eval run` itself; leave it out here")
        if key not in known:
            raise DataError(f"{path}: unknown key {key!r}; lm_eval knows {', '.join(known)}")
        if key in TEXT_KEYS and not isinstance(value, str | None):
            raise DataError(f"{path}: {key} is {value!r:.60}, needed is text")
        if key in MAPPING_KEYS and not isinstance(value, dict | str | None):
            raise DataError(f"{path}: {key} is {value!r:.60}, needed is a mapping")
    limit, shots = config.get("limit"), config.get("num_fewshot")
    if limit is not None and not (is_score(limit) and limit > 0):
        raise DataError(f"{path}: limit is {limit!r:.60}, needed is a number above 0 (below 1: a share of the items)")
    if shots is not None and not (isinstance(shots, int) and not isinstance(shots, bool) and shots >= 0):
        raise DataError(f"{path}: num_fewshot is {shots!r:.60}, needed is a whole number, 0 or more")
    tasks = config.get("tasks")
    named = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(named, list) or not named or not all(isinstance(name, str) and name for name in named):
        raise DataError(f"{path}: tasks is {tasks!r:.60}, needed is a list of task names")


def check_samples(recipe: EvalRecipe) -> None:
    """Refuse `samples` that lm-eval would stumble over once the model is merged."""
    found = recipe.samples
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in lists):
        raise DataError(
            f"{recipe.path}: samples is {found!r:.60}, needed is a mapping of tasks to lists of item numbers from 0"
        )


def include_path(recipe_path: str, include: str | None) -> str | None:
    """The folder of task files: relative to the working directory, as for lm_eval, else to the recipe's folder."""
    if include is None:
        return None
    folder = os.path.normpath(os.path.expanduser(include))
    if os.path.isdir(folder):
        return folder
    beside = Path(recipe_path).parent / folder
    if not beside.is_dir():
        raise DataError(
            f"{recipe_path}: include_path {include} is not a directory, seen from here or from the recipe; "
            "run from the repository's root or fix the path"
        )
    return str(beside)


def check_device(device: str | None) -> None:
    """Refuse a device that is not there: lm-eval would fall back to the CPU without a word."""
    if device is None or device == "cpu":
        return
    import torch

    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise DataError(f"torch does not know device {device!r}; try cpu, cuda, cuda:0 or mps") from None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind in there and index >= there[kind]:
        raise DataError(f"device {device!r} is not there: torch sees {there[kind]} of kind {kind}; try --device cpu")


def check_backend(path: str, model: str) -> None:
    """Refuse a `model:` that lm-eval does not know, or whose package is not installed: it would fail after the
    merge."""
    from lm_eval.models import MODEL_MAPPING

    if model not in MODEL_MAPPING:
        raise DataError(f"{path}: lm-eval does not know model {model!r}; hf is transformers, vllm is vLLM")
    package = BACKEND_PACKAGES.get(model)
    if package and find_spec(package) is None:
        raise DataError(
            f"{path}: model {model!r} needs the package {package}, which is not installed; install it, or use model: hf"
        )


def evaluator_config(recipe: EvalRecipe, model: str):
    """lm-eval's own EvaluatorConfig for scoring `model`, made as `lm_eval run --config` makes it."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    given = {key: value for key, value in recipe.config.items() if key not in IGNORED_KEYS and value is not None}
    given.update(model_args={**recipe.model_args, "pretrained": model}, output_path=".")
    return EvaluatorConfig(**given)._configure()
