"""What transformers could not load is refused before the merge, and by --dry_run; what it could load is not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from recipes_and_models import EVAL, left_over, merge_and_score, score, write_yaml

from common.errors import DataError

CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
UNKNOWN = f"which transformers {transformers.__version__} does not know"


def own(here: Path, name: str, file: str, **changes) -> None:
    """A copy of the model `name` in place of the link, with changes to one of its JSON files (None: without the
    key)."""
    target = (here / name).resolve()
    (here / name).unlink()
    shutil.copytree(target, here / name)
    path = here / name / file
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(*flags: str, call=merge_and_score) -> str:
    with pytest.raises(DataError) as stop:
        call(*flags)
    return str(stop.value)


ARCHITECTURES = {
    "code beside it": ({"auto_map": CODE}, ", and needs code of its own (auto_map), which is never run here"),
    "newer than this transformers": ({}, ""),
}


@pytest.mark.parametrize("changes, brings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_architecture_that_transformers_does_not_know(here, changes, brings):
    """Merged it could be, scored not: said before, with what goes on working."""
    own(here, "base", "config.json", model_type="unheard_of", **changes)
    line = (
        f"base: config.json has the model_type 'unheard_of', {UNKNOWN}{brings}; it cannot be scored: merge alone with "
        "--merge_only, or take a version of the model that transformers knows"
    )
    for flags in ([], ["--dry_run"], ["--model_args", "trust_remote_code=True"]):
        assert refused(*flags).removeprefix("./") == line
    assert left_over(here) == set()
    assert refused("--dry_run", "--output_path", "r.json", call=lambda *f: score("base", *f)).removeprefix("./") == (
        line.replace("merge alone with --merge_only, or take", "take")
    )
    assert "model 'vllm' needs the package vllm" in refused(call=_with_other_backend(here))


def _with_other_backend(here: Path):
    """Scoring by a model: that loads models itself, which is not installed and says so first."""

    def call(*_):
        write_yaml(here / "eval.yml", EVAL | {"model": "vllm"})
        merge_and_score()

    return call


def test_code_of_a_hub_repository_may_be_run_by_those_who_ask(here):
    """Refused, unless trust_remote_code is asked for by flag."""
    own(here, "base", "config.json", model_type="unheard_of", auto_map={"AutoConfig": "org/name--configuration_x.X"})
    assert "which is never run here" in refused("--dry_run")
    merge_and_score("--dry_run", "--model_args", "trust_remote_code=True")


def test_a_tokenizer_that_needs_code(here):
    """Its files are there, its class is in none of them."""
    own(
        here,
        "base",
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.X", None]},
        tokenizer_class="XTokenizer",
    )
    (here / "base" / "tokenizer.json").unlink()
    (here / "base" / "qwen.tiktoken").write_text("")
    line = refused("--dry_run")
    assert re.fullmatch(
        r"(\./)?base: its tokenizer cannot be loaded, and scoring needs one \(.+\); copy the tokenizer's files there "
        r"again, or "
        r"give another with --model_args tokenizer=…",
        line,
    )
    assert "/tmp" not in line and "trust_remote_code" not in line
    merge_and_score("--dry_run", "--model_args", "tokenizer=./wild")


def test_a_damaged_tokenizer(here):
    own(here, "base", "tokenizer_config.json")
    (here / "base" / "tokenizer.json").write_text("{")
    assert "base: its tokenizer cannot be loaded" in refused()
    assert left_over(here) == set()
