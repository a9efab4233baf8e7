"""A path is a path however it is spelled: to every flag that takes one, in recipes, and when a job is resumed.

Every case runs twice, plainly spelled and as the user spells it, in two copies of one folder; what is written where
must be the same, and nothing else may appear (a directory named ~, a second copy beside the first).
"""

import json
import shutil
import sys
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (it keeps a cache in the home directory, which moves below)
import pytest
from checkpoints import chain, files, prune_arguments, run
from conftest import ROOT
from recipes_and_models import set_the_table, write_yaml
from workplace import shell

import merge_and_evaluate_7b
from common.errors import DataError

SPELLINGS = {
    "plain": "{path}",
    "dot": "./{path}",
    "slash": "{path}/",
    "dot and slash": "./{path}/",
    "double slash": ".//{path}//",
    "there and back": "beside/../{path}",
    "home": "~/{path}",
    "home, slash": "~/{path}/",
    "through a link": "link/{path}",
    "absolute": "{folder}/{path}",
    "absolute, there and back": "{folder}/beside/../{path}/",
}
FILES = {name: text for name, text in SPELLINGS.items() if not text.endswith("/")}  # x/ is no file
EXTRACT = ["--finetuned_model_path", "a", "--base_model_path", "base", "--save_path", "vc"]
PRUNE = ["--n", "1", "--m", "4", "--base_model_path", "base"]
PAIR = ["--task_vector_path1", "va", "--task_vector_path2", "vb", "--save_directory1", "pa", "--save_directory2", "pb"]
LISTS = ["--task_vector_paths", "va", "vb", "--save_directories", "pa", "pb"]
PICTURE = ["--plot_path", "picture.png"]
DIRECTORIES = [
    ("convert", ["--model_path", "base", "--save_path", "out"], "--model_path"),
    ("convert", ["--model_path", "base", "--save_path", "out"], "--save_path"),
    *(("extract", EXTRACT, flag) for flag in ("--finetuned_model_path", "--base_model_path", "--save_path")),
    *(("prune", [*PAIR, *PRUNE], flag) for flag in (*PAIR[::2], "--base_model_path")),
    *(("prune", [*LISTS, *PRUNE], flag) for flag in ("--task_vector_paths", "--save_directories")),
    ("prune", [*PICTURE, "--plot_reports", "qa", "qb"], "--plot_reports"),
    ("prune", [*LISTS, *PRUNE, *PICTURE, "--plot_with", "qa", "qb"], "--plot_with"),
    ("prune", ["--verify", "va", "qa"], "--verify"),
]
QUICK = ("dot and slash",)  # of each flag; the other spellings are in the slow tests
COMMANDS = [
    *((script, given, flag, spelling) for script, given, flag in DIRECTORIES for spelling in SPELLINGS),
    *(("prune", [*PICTURE, "--plot_reports", "qa"], "--plot_path", spelling) for spelling in FILES),
]


def is_quick(script: str, given: list[str], flag: str, spelling: str) -> bool:
    """One spelling of each flag, of those that draw nothing."""
    return spelling in QUICK and not flag.startswith("--plot")


CASES = [
    pytest.param(
        *command, marks=[] if is_quick(*command) else pytest.mark.slow, id=" ".join([command[0], *command[2:]])
    )
    for command in COMMANDS
]


def spelled(given: list[str], flag: str, spelling: str, folder: Path) -> list[str]:
    """Every path after `flag`, spelled so: (["--n", "1", "--verify", "va"], "--verify", "./{path}") -> [...,
    "./va"].
    """
    out, ours = [], False
    for word in given:
        ours = word == flag if word.startswith("--") else ours
        is_path = ours and not word.startswith("--")
        out.append(spelling.format(path=word, folder=folder) if is_path else word)
    return out


def everything(folder: Path) -> dict[str, bytes]:
    """{path: bytes} below a folder, its own place in records replaced, so that two copies can be compared."""
    own = str(folder.resolve()).encode()
    return {name: data.replace(own, b"<folder>") for name, data in files(folder).items() if not name.endswith(".png")}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base, a, b, their vectors, and qa, qb, pruned from them; read only."""
    folder = chain(tmp_path_factory.mktemp("spelled"))
    run("prune", *prune_arguments(folder, "--save_directory1", folder / "qa", "--save_directory2", folder / "qb"))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it with spaces in its path: the working directory, and the home directory too."""
    folder = Path(shutil.copytree(made, tmp_path / "a user's own models"))
    (folder / "beside").mkdir()
    (folder / "link").symlink_to(".")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def plainly(made, tmp_path_factory):
    """plainly(script, arguments) -> what a command writes where its paths are spelled plainly; each is run once."""
    known = {}

    def answer(script: str, given: list[str]) -> dict[str, bytes]:
        key = (script, *given)
        if key not in known:
            folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("plain") / "x"))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                run(script, *given)
            known[key] = everything(folder)
        return known[key]

    return answer


@pytest.mark.parametrize("script, given, flag, spelling", CASES)
def test_every_flag_takes_every_spelling(place, plainly, script, given, flag, spelling):
    """The same files in the same places, to the last byte; labels in reports may be as the user spelled them."""
    run(script, *spelled(given, flag, SPELLINGS[spelling], place))
    want, got = plainly(script, given), everything(place)
    assert got.keys() == want.keys()
    differing = {name for name in want if got[name] != want[name]}
    assert all(name.endswith("prune_report.json") for name in differing)
    for name in differing:
        reports = [json.loads(text) for text in (got[name], want[name])]
        assert reports[0]["tensors"].keys() == reports[1]["tensors"].keys()
        assert [[t["hash"] for t in report["tensors"].values()] for report in reports][0] == [
            t["hash"] for t in reports[1]["tensors"].values()
        ]
    assert (place / "picture.png").is_file() == ("--plot_path" in given)


def test_a_name_with_a_tilde_inside_is_no_home(place):
    """Only ~ at the front is the home directory, as in a shell."""
    run("convert", "--model_path", "base", "--save_path", "odd~name")
    assert (place / "odd~name" / "model.safetensors").is_file()


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s != "plain"])
def test_an_output_over_an_input_is_refused_in_every_spelling(place, spelling):
    """Also where both are the same directory only after the spelling is resolved."""
    before = files(place)
    with pytest.raises(DataError, match="output and .* overlap"):
        run(
            "convert",
            "--model_path",
            "base",
            "--save_path",
            SPELLINGS[spelling].format(path="base", folder=place),
            "--overwrite",
        )
    assert files(place) == before


# --- resumed under another spelling ---------------------------------------------------------------


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import checkpoints
from common.shards import sink
count, real = 0, sink.Sink.finish_tensor

def finish_tensor(*arguments):
    global count
    result, count = real(*arguments), count + 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

sink.Sink.finish_tensor = finish_tensor
checkpoints.run({script!r}, *{arguments!r})
"""
RESUMED = {
    "convert": (["--model_path", "base", "--save_path", "out"], ["--model_path", "--save_path"], ["out"]),
    "extract": (EXTRACT, ["--finetuned_model_path", "--base_model_path", "--save_path"], ["vc"]),
    "prune": ([*LISTS, *PRUNE], ["--task_vector_paths", "--save_directories", "--base_model_path"], ["pa", "pb"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["dot", "slash", "there and back", "home", "through a link", "absolute"])
@pytest.mark.parametrize("script", RESUMED)
def test_a_killed_job_resumes_under_another_spelling(place, plainly, script, spelling):
    """Killed once shards are whole, then the same command with every path spelled otherwise: whole shards are kept."""
    given, flags, outputs = RESUMED[script]
    given = [*given, "--max_shard_size", "200B"]
    want = plainly(script, given)
    code = KILLED.format(path=[str(ROOT / "tests"), str(ROOT)], script=script, arguments=given)
    Path("killed.py").write_text(code)
    assert shell(f"exec '{sys.executable}' killed.py", place).returncode == -9
    Path("killed.py").unlink()
    # A shard counts once every output has it, so the one that was being finished may be there in the first alone.
    whole = set.intersection(*({path.name for path in Path(f"{o}.part").glob("*.safetensors")} for o in outputs))
    kept = {path: path.stat().st_ino for path in Path(f"{outputs[0]}.part").glob("*.safetensors") if path.name in whole}
    assert kept, "nothing was whole yet"
    for flag in flags:
        given = spelled(given, flag, SPELLINGS[spelling], place)
    run(script, *given)
    assert everything(place).keys() == want.keys()
    for path, inode in kept.items():
        assert (Path(outputs[0]) / path.name).stat().st_ino == inode, f"{path.name} was written again"
    assert all(everything(place)[name] == want[name] for name in want if name.endswith(".safetensors"))


# --- the fourth script ----------------------------------------------------------------------------


def merged_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if name.endswith(".safetensors")}


@pytest.fixture
def merge_folder(models, tmp_path, monkeypatch) -> Path:
    """The working directory of a merge, with spaces in its path, the home directory too."""
    folder = tmp_path / "a user's own merges"
    (folder / "beside").mkdir(parents=True)
    (folder / "link").symlink_to(".")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return set_the_table(folder, models)


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory) -> dict[str, bytes]:
    """The weights that the plainly spelled merge writes."""
    folder = set_the_table(tmp_path_factory.mktemp("table"), models)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        merge_and_evaluate_7b.main(["--recipe", "recipe.yml", "--save_path", "merged", "--merge_only"])
    return merged_files(folder / "merged")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merge_flags_and_verify(merge_folder, merged, spelling):
    """--save_path and --recipe of a merge, --verify of what it wrote."""
    at = {"folder": merge_folder}
    recipe = FILES.get(spelling, "{path}").format(path="recipe.yml", **at)
    save_path = SPELLINGS[spelling].format(path="merged", **at)
    merge_and_evaluate_7b.main(["--recipe", recipe, "--save_path", save_path, "--merge_only"])
    assert merged_files(merge_folder / "merged") == merged
    merge_and_evaluate_7b.main(["--verify", save_path])
    assert {path.name for path in merge_folder.iterdir()} == {
        *("base", "wild", "west", "tasks", "recipe.yml", "eval.yml", "beside", "link", "merged"),
    }


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_paths_in_a_merge_recipe(merge_folder, merged, spelling):
    """base_model and every model, spelled so."""
    from recipes_and_models import RECIPE

    def put(name: str) -> str:
        return SPELLINGS[spelling].format(path=name, folder=merge_folder)

    models = [entry | {"model": put(entry["model"].removeprefix("./"))} for entry in RECIPE["models"]]
    write_yaml(merge_folder / "recipe.yml", RECIPE | {"base_model": put("base"), "models": models})
    merge_and_evaluate_7b.main(["--recipe", "recipe.yml", "--save_path", "merged", "--merge_only"])
    assert merged_files(merge_folder / "merged") == merged


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scoring_and_comparing(merge_folder, spelling):
    """--eval_only --save_path, --eval_recipe, --output_path, include_path in the recipe; then --compare,
    --plot_path."""
    at = {"folder": merge_folder}
    one_file = FILES.get(spelling, "./{path}")
    include = SPELLINGS[spelling].format(path="tasks", **at)
    write_yaml(merge_folder / "eval.yml", {"model": "hf", "include_path": include, "tasks": ["colours"], "limit": 2})
    results = one_file.format(path="results.json", **at)
    merge_and_evaluate_7b.main(
        [
            *("--eval_only", "--save_path", SPELLINGS[spelling].format(path="west", **at)),
            *("--eval_recipe", one_file.format(path="eval.yml", **at), "--output_path", results),
        ]
    )
    summary = json.loads((merge_folder / "results.json").read_text())["summary"]
    assert summary["name"] == "west" and list(summary["tasks"]) == ["colours"]
    merge_and_evaluate_7b.main(["--compare", results, "--plot_path", one_file.format(path="table.png", **at)])
    assert (merge_folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert not (merge_folder / "~").exists()
