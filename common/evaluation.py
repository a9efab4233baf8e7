"""Score a model with lm-evaluation-harness, as its own YAML config says.

The config is the file that `lm_eval run --config` takes, read by lm-eval itself.
"""

import json
import os
from dataclasses import asdict, dataclass
from glob import glob
from importlib.metadata import version
from pathlib import Path

from common.errors import DataError
from common.hashing import file_hash, text_hash
from common.recipes import read_yaml

IGNORED_KEYS = {"config", "output_path", "show_config", "verbosity"}  # this script says where results go
HUB_KEYS = {"wandb_args", "wandb_config_args", "hf_hub_log_args", "trackio_args"}


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


def read_eval_recipe(path: str, device: str | None = None, batch_size: int | str | None = None) -> EvalRecipe:
    """The eval recipe at `path`; a flag that is given wins over the file. Unknown keys are refused."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    text, config = read_yaml(path)
    known = [key for key in EvaluatorConfig.__dataclass_fields__ if key not in HUB_KEYS]
    for key in config:
        if key in HUB_KEYS:
            raise DataError(f"{path}: {key!r} is for `lm_eval run` itself; leave it out here")
        if key not in known:
            raise DataError(f"{path}: unknown key {key!r}; lm_eval knows {', '.join(known)}")
    tasks = config.get("tasks")
    named = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(named, list) or not named or not all(isinstance(name, str) and name for name in named):
        raise DataError(f"{path}: tasks is {tasks!r:.60}, needed is a list of task names")
    flags = {"device": device, "batch_size": batch_size}
    config = {**config, **{key: value for key, value in flags.items() if value is not None}}
    config["include_path"] = include_path(path, config.get("include_path"))
    check_device(config.get("device"))
    return EvalRecipe(path, text, config)


def include_path(recipe_path: str, include: str | None) -> str | None:
    """The folder of task files: relative to where the user stands, as for lm_eval, else to the recipe's folder."""
    if include is None or os.path.isdir(include):
        return include
    beside = Path(recipe_path).parent / include
    if not beside.is_dir():
        raise DataError(
            f"{recipe_path}: include_path {include} is no directory, seen from here or from the recipe; "
            "run from the repository's root or mend the path"
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
        raise DataError(f"device {device!r} is none that torch knows; try cpu, cuda, cuda:0 or mps") from None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind in there and index >= there[kind]:
        raise DataError(
            f"device {device!r} is not there: torch sees {there[kind]} of kind {kind}; try --device cpu"
        )


# --- tasks ----------------------------------------------------------------------------------------


def leaf_tasks(index: dict, names: list[str]) -> list[str] | None:
    """The tasks that groups and tags stand for, or None if one of them is not in lm-eval's `index`."""
    leaves = []
    for name in names:
        entry = index.get(name)
        if entry is None:
            return None
        if entry.kind.name in ("TASK", "PY_TASK"):
            leaves.append(name)
            continue
        members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task") or []
        members = [m if isinstance(m, str) else m.get("task", m.get("group")) for m in members]
        inner = leaf_tasks(index, [member for member in members if isinstance(member, str)])
        if inner is None:
            return None
        leaves += inner
    return list(dict.fromkeys(leaves))


def _matches(manager, name: str) -> list[str]:
    """The tasks that one entry of `tasks` means, as for lm_eval: a name, a pattern, YAML files, or a folder."""
    matched = manager.match_tasks([name])
    if not matched:
        pattern = os.path.join(name, "*.yaml") if os.path.isdir(name) else name
        return sorted(glob(pattern)) if pattern.endswith(".yaml") else []
    return matched if leaf_tasks(manager.task_index, matched) is not None else []


@dataclass(frozen=True)
class Tasks:
    """Names that lm-eval's TaskManager `manager` can load."""

    manager: object
    names: list[str]

    def only(self, names: list[str]) -> "Tasks":
        """The part of these tasks that `names` mean."""
        return Tasks(
            self.manager, list(dict.fromkeys(t for name in names for t in _matches(self.manager, name)))
        )

    @property
    def leaves(self) -> list[str]:
        """The tasks themselves, where `names` may be groups; YAML files stand for themselves."""
        index = self.manager.task_index
        return [
            leaf for name in self.names for leaf in (leaf_tasks(index, [name]) if name in index else [name])
        ]


def find_tasks(recipe: EvalRecipe, names: list[str]) -> Tasks:
    """The tasks that `names` mean. Raises DataError for one that nobody knows.

    Reading lm-eval's own 14,000 task files takes 8 seconds, so they are only read if the recipe's folder
    does not do.
    """
    from lm_eval.tasks import TaskManager

    include = recipe.config["include_path"]
    metadata = {**model_arguments(recipe), **(recipe.config.get("metadata") or {})}
    for with_own in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=with_own, metadata=metadata)
        unknown = [name for name in names if not _matches(manager, name)]
        if not unknown:
            return Tasks(manager, []).only(names)
    raise DataError(
        f"{recipe.path}: lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, "
        "include_path adds yours"
    )


# --- scoring --------------------------------------------------------------------------------------


def model_arguments(recipe: EvalRecipe) -> dict:
    """The recipe's model_args, to which the model that is scored is added as `pretrained`."""
    from lm_eval.utils import simple_parse_args_string

    given = recipe.config.get("model_args") or {}
    given = simple_parse_args_string(given) if isinstance(given, str) else given
    return {key: value for key, value in given.items() if key != "pretrained"}


def _simple_evaluate(recipe: EvalRecipe, model: str, tasks: Tasks, cache: str | None) -> dict | None:
    """lm-eval's results for one model, put together as `lm_eval run` does."""
    from lm_eval import simple_evaluate
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker

    settings = {
        key: value for key, value in recipe.config.items() if key not in IGNORED_KEYS and value is not None
    }
    settings.update(model_args={**model_arguments(recipe), "pretrained": model}, output_path=".")
    config = EvaluatorConfig(**settings)._configure()
    requests = config.cache_requests if isinstance(config.cache_requests, dict) else {}
    tracker = EvaluationTracker()
    results = simple_evaluate(
        model=config.model,
        model_args=config.model_args,
        tasks=tasks.names,
        task_manager=tasks.manager,
        use_cache=cache,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=config.device,
        limit=config.limit,
        samples=config.samples,
        log_samples=config.log_samples,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        predict_only=config.predict_only,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs or None,
        random_seed=config.seed and config.seed[0],
        numpy_random_seed=config.seed and config.seed[1],
        torch_random_seed=config.seed and config.seed[2],
        fewshot_random_seed=config.seed and config.seed[3],
        cache_requests=requests.get("cache_requests", False),
        rewrite_requests_cache=requests.get("rewrite_requests_cache", False),
        delete_requests_cache=requests.get("delete_requests_cache", False),
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        evaluation_tracker=tracker,
    )
    if results is None:  # another process of `accelerate launch` has them
        return None
    tracker.general_config_tracker.log_end_time()
    return {**results, **asdict(tracker.general_config_tracker)}


def evaluate(recipe: EvalRecipe, model: str, tasks: Tasks, identity: str) -> dict | None:
    """lm-eval's document for one model on these tasks; None in the helper processes of `accelerate launch`.

    A response cache asked for by `use_cache` is kept apart by `identity`, the model's hash: lm-eval keys it
    by request alone and would hand one model's answers to the next. Raises DataError if lm-eval fails.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = recipe.config.get("use_cache")
    try:
        return _simple_evaluate(recipe, model, tasks, f"{cache}_{identity}" if cache else None)
    except (
        Exception
    ) as error:  # lm-eval, datasets and transformers raise many types; the user needs the reason
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{recipe.path}: lm-eval could not score {model} on {', '.join(tasks.names)}: {reason:.300}"
        ) from error


# --- what decides a score -------------------------------------------------------------------------


def _data_files(config: dict) -> list[str]:
    """The local files in a task's `dataset_kwargs: {data_files: …}`."""
    found = (config.get("dataset_kwargs") or {}).get("data_files") or []
    found = list(found.values()) if isinstance(found, dict) else found
    found = (
        [found]
        if isinstance(found, str)
        else [p for item in found for p in ([item] if isinstance(item, str) else item)]
    )
    return [path for path in found if os.path.isfile(path)]


def _task_files(recipe: EvalRecipe, tasks: Tasks) -> list[Path]:
    """The recipe's own task files, and the local data that its tasks read."""
    include = recipe.config["include_path"]
    files = {path for path in Path(include).rglob("*") if path.is_file()} if include else set()
    index = tasks.manager.task_index
    for name in tasks.leaves:
        files |= (
            {Path(path) for path in _data_files(index[name].cfg or {})} if name in index else {Path(name)}
        )
    return sorted(path for path in files if "__pycache__" not in path.parts)


def eval_identity(recipe: EvalRecipe, tasks: Tasks, model_identity: str) -> str:
    """What decides a score, as one hash: the model, the recipe with its flags, its tasks and their local data."""
    parts = {
        "model": model_identity,
        "recipe": recipe.config,
        "tasks": tasks.names,
        "lm_eval": version("lm_eval"),
        "files": [[str(path), file_hash(path)] for path in _task_files(recipe, tasks)],
    }
    return text_hash(json.dumps(parts, sort_keys=True, default=str))
