"""A path is a path however it is spelled; what is there already, and what is only an empty directory."""

import argparse
import json
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from checkpoints import chain, files, prune_arguments, refusal, run, state, usage_error, write
from hypothesis import given, settings

from common import cli
from common.shards.places import plain, whole_path

PARTS = st.lists(st.sampled_from(["a", "b", "link", "..", ".", "new"]), max_size=7)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory and home: a/b, and a link to a/b."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


SPELLINGS = [
    "a/b",
    "./a/b",
    "a/b/",
    "a//b/.",
    "a/../a/b",
    "new/../a/b",
    "a/b/../b",
    "~/a/b",
    "link/../b",
    "link/../../link",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings_of_one_directory(here, text):
    for spelled in (text, f"{here}/{text}" if not text.startswith("~") else text):
        assert whole_path(cli.path(spelled)) == str(here / "a" / "b")
        assert os.path.realpath(cli.path_or_hub_id(spelled)) == str(here / "a" / "b")


def test_short_spellings(here):
    texts = {"./a/": "a", "a/../b": "b", "..": "..", "a/..": ".", ".": ".", "../../x/../y": "../../y", "/..": "/"}
    assert {text: str(plain(Path(text))) for text in texts} == texts
    assert str(plain(Path("link/.."))) == str(here / "a")


@settings(max_examples=200, deadline=None)
@given(PARTS)
def test_a_plain_path_is_where_the_kernel_goes(tmp_path_factory, parts):
    """Wherever the kernel finds something under the long spelling, the short one is the same place."""
    root = tmp_path_factory.getbasetemp() / "plain"
    if not root.exists():
        (root / "a" / "b").mkdir(parents=True)
        (root / "b").mkdir()
        (root / "link").symlink_to("a/b")
        (root / "a" / "b" / "link").symlink_to("../../b")
    long = root.joinpath(*parts)
    if os.path.exists(str(root) + "/" + "/".join(parts)):
        assert os.path.samefile(str(root) + "/" + "/".join(parts), plain(long))
    assert plain(plain(long)) == plain(long)


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "an empty path; is a shell variable in it not set?"),
        ("~nobody-of-that-name/x", "'~nobody-of-that-name/x': there is no such home directory; write the path out"),
    ],
)
def test_no_path(here, capsys, text, line):
    with pytest.raises(argparse.ArgumentTypeError, match=line[:20]):
        cli.path_or_hub_id(text)
    assert usage_error(capsys, "convert", f"--save_path={text}") == f"argument --save_path: {line}"


def test_hub_ids(here):
    """As typed, unless there is such a directory; what was no Hub id as typed does not become one."""
    assert cli.path_or_hub_id("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
    assert cli.path_or_hub_id("a/b") == "a/b"
    assert [cli.path_or_hub_id(text) for text in ("./no/x", "no/x/", "a/../no/x")] == ["./no/x"] * 3
    assert cli.path_or_hub_id("../no/x") == "../no/x"
    assert refusal("convert", "--model_path", "./no/x", "--save_path", "out") == (
        "./no/x: no such directory; check the path, or give a Hugging Face Hub id such as org/name"
    )


def test_home_after_an_equals_sign(here):
    """A shell leaves --save_path=~/x alone (cases.md B2)."""
    write(here / "m", state())
    run("convert", "--model_path=~/m/", "--save_path=~/x/y/")
    assert (here / "x" / "y" / "model.safetensors").is_file() and not (here / "~").exists()


@pytest.fixture
def linked(tmp_path, monkeypatch) -> Path:
    """A chain in `real`, worked on through the link `work`."""
    chain(tmp_path / "real")
    (tmp_path / "work").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune_command(folder: str, ending: str = "") -> list[str]:
    return [f"{argument}{ending if '/' in str(argument) else ''}" for argument in prune_arguments(Path(folder))]


@pytest.mark.parametrize("spelling", ["./real", "work", "real/../work", "{here}/real"])
def test_any_spelling_resumes_a_stopped_job(linked, monkeypatch, spelling):
    """Stopped before it publishes, named otherwise: the same job, and nothing is streamed again."""
    from common.shards import publish, stream

    monkeypatch.setattr(publish, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("prune", *prune_command("real"))
    monkeypatch.undo()
    monkeypatch.chdir(linked)
    assert (linked / "real" / "pa.part").is_dir()
    monkeypatch.setattr(stream, "run", lambda *_: pytest.fail("streamed again"))
    run("prune", *prune_command(spelling.format(here=linked), "/"))
    assert (linked / "real" / "pa" / "prune_report.json").is_file()


def test_any_spelling_of_convert_resumes(linked, monkeypatch):
    from common.shards import publish, stream

    monkeypatch.setattr(publish, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("convert", "--model_path", "real/base", "--save_path", "out")
    monkeypatch.undo()
    monkeypatch.chdir(linked)
    monkeypatch.setattr(stream, "run", lambda *_: pytest.fail("streamed again"))
    run("convert", "--model_path", f"{linked}/work/base/", "--save_path", "./out/")
    assert (linked / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("form", ["./{}", "{}/", "../here/{}", "~/{}"])
def test_prune_takes_any_spelling(tmp_path, monkeypatch, form):
    """The README's own commands write ./models/x: they must reach the end (cases.md B1)."""
    chain(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    flags = ["--task_vector_paths", "va", "vb", "--save_directories", "pa", "pb"]
    run("prune", *(form.format(flag) if flag[0] != "-" else flag for flag in flags))
    run("prune", "--task_vector_paths", "va", "vb", "--save_directories", "qa", "qb")
    assert files(Path("pa"))["model.safetensors"] == files(Path("qa"))["model.safetensors"]
    assert json.loads(Path("pb/prune_report.json").read_text())["tensors"]
