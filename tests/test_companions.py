"""What lies beside the weights: the set that transformers reads, copied, downloaded and recognised alike; never
code.
"""

import ast
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
from checkpoints import chain, files, prune_arguments, run, state, write
from conftest import save_tokenizer

from common.shards import hub
from common.shards.companions import COMPANIONS, code_note, companion_files, has_tokenizer, without_code


def transformers_files() -> set[str]:
    """Every file name in a VOCAB_FILES_NAMES or vocab_files_names of transformers, and its configs of processors."""
    import transformers
    from transformers import utils

    names = {
        utils.FEATURE_EXTRACTOR_NAME,
        utils.IMAGE_PROCESSOR_NAME,
        utils.VIDEO_PROCESSOR_NAME,
        utils.AUDIO_TOKENIZER_NAME,
        utils.PROCESSOR_NAME,
        utils.GENERATION_CONFIG_NAME,
        utils.CHAT_TEMPLATE_FILE,
        utils.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer_config.json",
        f"{utils.CHAT_TEMPLATE_DIR}/tool_use.jinja",
    }
    for path in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            ids = {getattr(target, "id", "").lower() for target in targets}
            if "vocab_files_names" in ids and isinstance(getattr(node, "value", None), ast.Dict):
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    return names


@pytest.mark.slow
def test_the_list_is_transformers():
    names = transformers_files()
    assert len(names) > 30 and "prophetnet.tokenizer" in names
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in COMPANIONS)} == set()
    assert set(COMPANIONS) < set(hub.SMALL)


VOCAB_ALONE = [
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "vocab-src.json",
]


@pytest.mark.slow
def test_companions_travel_along_the_chain(tmp_path):
    """To the converted model, the vector and what is pruned from it, byte for byte."""
    for name in VOCAB_ALONE:
        content = f'{{"{name}": 1}}\n'
        (tmp_path / name).write_text(content)
    folder = chain(tmp_path / "c")
    for name in VOCAB_ALONE:
        (folder / "a" / name).write_bytes((tmp_path / name).read_bytes())
    (folder / "a" / "modeling_x.py").write_text("raise SystemExit")
    run("convert", "--model_path", folder / "a", "--save_path", folder / "out")
    flags = ["--finetuned_model_path", folder / "a", "--base_model_path", folder / "base", "--save_path", folder / "va"]
    run("extract", *flags, "--overwrite")
    run("prune", *prune_arguments(folder))
    for place in ("out", "va", "pa"):
        assert {name: files(folder / place)[name] for name in VOCAB_ALONE} == {
            name: (tmp_path / name).read_bytes() for name in VOCAB_ALONE
        }
        assert not list((folder / place).glob("*.py"))


def test_several_chat_templates_travel_along(tmp_path):
    """A tokenizer with more than one template keeps the others in a folder: to the end of the chain, and read from
    there."""
    from transformers import AutoTokenizer

    folder = chain(tmp_path / "c")
    save_tokenizer(folder / "a")
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    tokenizer.chat_template = {"default": "{{ 'plain' }}", "tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(folder / "a")
    template = Path("additional_chat_templates") / "tool_use.jinja"
    assert (folder / "a" / template).is_file()
    flags = ["--finetuned_model_path", folder / "a", "--base_model_path", folder / "base", "--save_path", folder / "va"]
    run("extract", *flags, "--overwrite")
    run("prune", *prune_arguments(folder))
    for place in ("va", "pa"):
        assert (folder / place / template).read_bytes() == (folder / "a" / template).read_bytes()
        read = AutoTokenizer.from_pretrained(folder / place)
        assert (
            read.apply_chat_template([{"role": "user", "content": "?"}], chat_template="tool_use", tokenize=False)
            == "tools"
        )


def test_of_folders_only_the_templates_are_downloaded():
    """What filter_repo_objects, which snapshot_download asks, lets through."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "additional_chat_templates/tool_use.jinja", "model.safetensors", "tokenizer.model"]
    others = [f"{folder}/{name}" for folder in ("original", "adapters", "onnx", "a", "additional") for name in names]
    patterns = ["model.safetensors", *hub.SMALL]
    kept = filter_repo_objects([*names, *others], allow_patterns=patterns, ignore_patterns=[*hub.NEVER])
    assert list(kept) == names


@pytest.mark.parametrize(
    "names, expected",
    [
        (["vocab.json", "merges.txt"], True),
        (["spiece.model"], True),
        (["vocab.txt"], True),
        (["tekken.json"], True),
        (["tokenizer_config.json"], True),
        (["config.json", "generation_config.json", "merges.txt"], False),
        ([], False),
    ],
)
def test_what_is_a_tokenizer(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).write_text("{}")
    assert has_tokenizer(tmp_path) is expected


@pytest.mark.slow
def test_a_tokenizer_of_vocab_and_merges_is_usable(tmp_path, models):
    """It passes for a tokenizer before the merge, and loads from the merged model."""
    from transformers import GPT2TokenizerFast

    import merge_and_evaluate_7b

    words = ["<|endoftext|>", "s", "k", "y", "sk", "sky", "Ġ"]
    for name in ("base", "wild"):
        shutil.copytree(models / name, tmp_path / name)
        for path in (tmp_path / name).glob("tokenizer*"):
            path.unlink()
        (tmp_path / name / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (tmp_path / name / "merges.txt").write_text("#version: 0.2\ns k\nsk y\n")
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\ndtype: float32\nout_dtype: float16\n"
        f"models: [{{model: {tmp_path}/wild, parameters: {{weight: 1.0}}}}]\n"
    )
    merge_and_evaluate_7b.main(["--recipe", f"{tmp_path}/r.yml", "--save_path", f"{tmp_path}/merged", "--merge_only"])
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert GPT2TokenizerFast.from_pretrained(tmp_path / "merged")("sky")["input_ids"] == [5]


# --- code -----------------------------------------------------------------------------------------

CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}


def test_without_code():
    """Names of files beside it leave; names of a Hub repository stay; so does everything else."""
    hub_name = {"AutoConfig": "org/name--configuration_x.XConfig"}
    assert without_code({"auto_map": CODE, "n": [1, {"auto_map": CODE}]}) == {"n": [1, {}]}
    assert without_code({"auto_map": CODE | hub_name, "text_config": {"auto_map": CODE}}) == {
        "auto_map": hub_name,
        "text_config": {},
    }
    assert without_code({"auto_map": {"AutoTokenizer": ["t.Slow", None]}}) == {}
    assert without_code({"auto_map": {"AutoTokenizer": [None, "o/n--t.Fast"]}}) == {
        "auto_map": {"AutoTokenizer": [None, "o/n--t.Fast"]}
    }
    assert without_code({"auto_map": ["t.Slow", None]}) == {} and without_code({"auto_map": None}) == {}


def test_code_is_neither_run_nor_named(tmp_path, capsys):
    """auto_map with its files beside: a line says so, and no output names what is not there."""
    config = {"model_type": "mistral", "tie_word_embeddings": False, "auto_map": CODE}
    base = write(tmp_path / "base", state(), config)
    write(tmp_path / "ft", state(1, near=state()), config)
    for name in ("base", "ft"):
        (tmp_path / name / "configuration_x.py").write_text("raise SystemExit('it was run')")
        tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "model_max_length": 9}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    line = (
        f"note: {base} brings code of its own: auto_map in config.json (configuration_x.py beside it). It was not run "
        "and is not copied, and outputs do not name it; to load one with that code, copy the .py files and the "
        "auto_map from there"
    )
    assert code_note(config, base, str(base)) == line.removeprefix("note: ")
    run("convert", "--model_path", base, "--save_path", tmp_path / "out")
    assert line in capsys.readouterr().out.splitlines()
    flags = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "out"]
    run("extract", *flags, "--save_path", tmp_path / "v")
    assert f"note: {tmp_path / 'ft'} brings code of its own" in capsys.readouterr().out
    run("prune", "--task_vector_paths", tmp_path / "v", "--save_directories", tmp_path / "p", "--base_model_path", base)
    for name in ("out", "v", "p"):
        assert b"auto_map" not in b"".join(v for k, v in files(tmp_path / name).items() if k.endswith("config.json"))
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text()) == {"model_max_length": 9}


def test_no_code_in_companions(tmp_path):
    (tmp_path / "tokenizer_x.py").write_text("")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert [path.name for path in companion_files(tmp_path)] == ["tokenizer.json"]


def test_code_of_a_hub_repository_stays_named(tmp_path, capsys):
    config = {"model_type": "mistral", "auto_map": {"AutoConfig": "org/name--configuration_x.X"}}
    base = write(tmp_path / "base", state(), config)
    run("convert", "--model_path", base, "--save_path", tmp_path / "out")
    assert f"note: {base} names code of a Hub repository" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == config["auto_map"]


@pytest.mark.slow
def test_a_merge_that_needs_the_code_says_so(tmp_path):
    """transformers would have one pass trust_remote_code=True, a flag that no script here has."""
    import merge_and_evaluate_7b
    from common.exits import run as run_main

    config = {
        "model_type": "unheard_of",
        "tie_word_embeddings": False,
        "auto_map": CODE,
        "architectures": ["XForCausalLM"],
    }
    for name in ("base", "ft"):
        model = write(tmp_path / name, state(int(name == "ft")), config)
        (model / "configuration_x.py").write_text("raise SystemExit('it was run')")
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\ndtype: float32\n"
        f"models: [{{model: {tmp_path}/ft, parameters: {{weight: 1.0}}}}]\n"
    )
    with pytest.raises(SystemExit) as stop:
        flags = ["--recipe", f"{tmp_path}/r.yml", "--save_path", f"{tmp_path}/merged", "--merge_only"]
        run_main(lambda: merge_and_evaluate_7b.main([*flags, "--engine", "mergekit"]))
    assert "names code of its own (auto_map), which is never run" in stop.value.code
    assert "trust_remote_code" not in stop.value.code
    run_main(lambda: merge_and_evaluate_7b.main(flags))  # streamed, by names alone: the code is not needed
    assert (tmp_path / "merged" / "model.safetensors").is_file()
