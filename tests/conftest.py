"""Tiny real models, made on the spot: transformers classes, tokenizer files, a local lm-eval task."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

gc.disable()  # until all is imported: going over what imports leave, again and again, is a fifth of their time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config) -> int | None:
    """How many processes `-n auto` of pyproject.toml starts: xdist's own choice for the whole suite, none where files
    are named, since each process spends ten seconds on imports before its first test."""
    return 0 if any(".py" in argument for argument in config.args) else None


# A condition in words is asked where a test begins: the process that only hands tests out need not import torch.
NO_CUDA = pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="torch sees no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]


def first_quick(*cases) -> list:
    """Parameters of which the first runs always, the others only where slow tests do.

    For dtypes and group sizes, each of which compiles kernels of its own: most of the time in a fresh clone.
    """
    return [
        cases[0],
        *(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases[1:]),
    ]


COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow"}


def save_tokenizer(directory: Path) -> int:
    """A word-level tokenizer over the words of COLOURS; returns its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "the", "is", "?", "what", "colour", *COLOURS, *COLOURS.values()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return len(words)


def save_model(directory: Path, seed: int, dtype="float16", scale: float = 1.0, vocab: int | None = None) -> Path:
    """A two-layer Mistral with random weights and a tokenizer in `directory`."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    directory.mkdir(parents=True)
    size = save_tokenizer(directory)
    config = MistralConfig(
        vocab_size=vocab or size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.save_pretrained(directory, max_shard_size="20KB" if seed % 2 else "1GB")
    return directory


def save_tasks(directory: Path, names=("colours",)) -> Path:
    """A folder with a multiple-choice task per name, and their data as jsonl."""
    directory.mkdir(parents=True)
    data = directory / "colours.jsonl"
    choices = list(COLOURS.values())
    lines = [json.dumps({"thing": t, "choices": choices, "gold": choices.index(c)}) for t, c in COLOURS.items()]
    data.write_text("\n".join(lines) + "\n")
    for name in names:
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "the {{thing}} is",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 1},
        }
        (directory / f"{name}.yaml").write_text(json.dumps(task))
    return directory


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with base, wild and west: three models of one shape; read only."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "wild", "west")):
        save_model(folder / name, seed)
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """The working directory of a merge: base, wild, west, recipe.yml, eval.yml and tasks/ (recipes_and_models.py)."""
    from recipes_and_models import set_the_table

    monkeypatch.chdir(tmp_path)
    return set_the_table(tmp_path, models)


@pytest.fixture
def long_tasks(here) -> None:
    """eval.yml with three tasks of many items (long_tasks.py)."""
    from long_tasks import EVAL, save_long_tasks
    from recipes_and_models import write_yaml

    save_long_tasks(here / "tasks")
    write_yaml(here / "eval.yml", EVAL)


@pytest.fixture
def asked(here, long_tasks, monkeypatch) -> list[tuple[str, str, int]]:
    """What a race asks for, without models; 1,000 items to choose on, for all five rounds (long_tasks.py)."""
    from long_tasks import save_long_tasks, without_models

    save_long_tasks(here / "tasks", times=5)
    return without_models(monkeypatch)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A copy of the repository with the downloads of the README in it (workplace.py)."""
    from workplace import make_workplace

    return make_workplace(tmp_path_factory.mktemp("clone"))
