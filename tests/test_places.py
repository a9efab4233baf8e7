"""A path is a path however it is spelled; what is there already, and what is only an empty directory."""

import argparse
import os
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from checkpoints import chain, files, prune_arguments, refusal, run, state, usage_error, write
from conftest import ROOT
from hypothesis import given, settings

from common import cli
from common.shards.places import plain, whole_path

PARTS = st.lists(st.sampled_from(["a", "b", "link", "..", ".", "new"]), max_size=7)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
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
def test_spellings_of_one_directory(home, text):
    for spelled in (text, f"{home}/{text}" if not text.startswith("~") else text):
        assert whole_path(cli.path(spelled)) == str(home / "a" / "b")
        assert os.path.realpath(cli.path_or_hub_id(spelled)) == str(home / "a" / "b")


def test_short_spellings(home):
    texts = {"./a/": "a", "a/../b": "b", "..": "..", "a/..": ".", ".": ".", "../../x/../y": "../../y", "/..": "/"}
    assert {text: str(plain(Path(text))) for text in texts} == texts
    assert str(plain(Path("link/.."))) == str(home / "a")


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
def test_no_path(home, capsys, text, line):
    with pytest.raises(argparse.ArgumentTypeError, match=line[:20]):
        cli.path_or_hub_id(text)
    assert usage_error(capsys, "convert", f"--save_path={text}") == f"argument --save_path: {line}"


def test_hub_ids(home):
    """As typed, unless there is such a directory; what was no Hub id as typed does not become one."""
    assert cli.path_or_hub_id("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
    assert cli.path_or_hub_id("a/b") == "a/b"
    assert [cli.path_or_hub_id(text) for text in ("./no/x", "no/x/", "a/../no/x")] == ["./no/x"] * 3
    assert cli.path_or_hub_id("../no/x") == "../no/x"
    assert refusal("convert", "--model_path", "./no/x", "--save_path", "out") == (
        "./no/x: no such directory; check the path, or give a Hugging Face Hub id such as org/name"
    )


def test_home_after_an_equals_sign(home):
    """A shell leaves --save_path=~/x alone."""
    write(home / "m", state())
    run("convert", "--model_path=~/m/", "--save_path=~/x/y/")
    assert (home / "x" / "y" / "model.safetensors").is_file() and not (home / "~").exists()


@pytest.fixture
def linked(tmp_path, monkeypatch) -> Path:
    """A chain in `real`, worked on through the link `work`."""
    chain(tmp_path / "real")
    (tmp_path / "work").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune_command(folder: str, ending: str = "") -> list[str]:
    return [f"{argument}{ending if '/' in str(argument) else ''}" for argument in prune_arguments(Path(folder))]


@pytest.mark.parametrize("spelling", ["./real", "work", "real/../work", "{linked}/real"])
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
    run("prune", *prune_command(spelling.format(linked=linked), "/"))
    assert (linked / "real" / "pa" / "prune_report.json").is_file()


# --- an empty directory that is there already -----------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "m", state())


def convert(model: Path, out: Path, *more) -> None:
    run("convert", "--model_path", model, "--save_path", out, *more)


def test_an_empty_directory_is_nothing(model, tmp_path, capsys):
    """mkdir -p before the command: accepted, also through a link; anything in it is not."""
    (tmp_path / "out").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    convert(model, tmp_path / "out", "--dry_run")
    assert "refused without --overwrite" not in capsys.readouterr().out
    convert(model, tmp_path / "out")
    convert(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "target") == files(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m", "out", "target"]
    for place in ("out", "link"):
        line = refusal("convert", "--model_path", model, "--save_path", tmp_path / place)
        assert line == f"{tmp_path / place}: already there; give --overwrite to replace it, or write elsewhere"
    convert(model, tmp_path / "link", "--overwrite", "--dtype", "float32")
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "target") != files(tmp_path / "out")


def test_what_an_input_links_to_is_not_replaced(model, tmp_path):
    """An input made of links, and --overwrite where they lead: its own weights would be deleted. Beside is fine."""
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name, linked in (("view", ["config.json", "model.safetensors"]), ("chat", ["additional_chat_templates"])):
        shutil.copytree(model, tmp_path / name)
        for entry in linked:
            remove(tmp_path / name / entry)
            (tmp_path / name / entry).symlink_to(model / entry)
    before = files(model)
    for name, linked in (("view", "config.json"), ("chat", "additional_chat_templates/tools.jinja")):
        command = ["convert", "--model_path", tmp_path / name, "--dtype", "bfloat16", "--overwrite"]
        line = f"{model}: output and {model}/{linked} overlap; give the output a directory of its own"
        assert refusal(*command, "--save_path", model) == line
        assert files(model) == before
        run(*command, "--save_path", tmp_path / "out")


def test_a_results_file_needs_a_files_name(tmp_path):
    from common.errors import DataError
    from common.shards.places import refuse_existing_file

    with pytest.raises(DataError, match="a directory; give a file's name"):
        refuse_existing_file(tmp_path, True)


def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path):
    """It is drawn last, when the outputs are there, and the same command would be refused because of them."""
    chain(tmp_path)
    (tmp_path / "pics.png").mkdir()
    (tmp_path / "file").touch()
    for picture, line in (
        ("pics.png", "{0}/pics.png: a directory; give a file's name"),
        ("file/new/a.png", "{0}/file/new/a.png: nothing can be written to {0}/file; give another place"),
    ):
        assert refusal("prune", *prune_arguments(tmp_path, "--plot_path", tmp_path / picture)) == line.format(tmp_path)
    assert not list(tmp_path.glob("pa*"))


@pytest.fixture
def mounted(tmp_path, monkeypatch) -> Path:
    """A directory that cannot be renamed, as a mount point is one: renaming to or from it fails as there."""
    from common.shards import places, staging

    out = tmp_path / "disk"
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(places.os.path, "ismount", lambda path: os.path.realpath(path) == str(out))
    real = os.rename

    def rename(source, target):
        if str(out) in (str(source), str(target)):
            raise OSError(16, "Device or resource busy", str(out))
        inside = [str(path).startswith(f"{out}/") for path in (source, target)]
        if inside[0] != inside[1]:
            raise OSError(18, "Invalid cross-device link", str(source))
        return real(source, target)

    monkeypatch.setattr(staging.os, "rename", rename)
    return out


def test_a_mount_point(model, tmp_path, mounted):
    """Made within it, and moved up at the end; replaced with --overwrite; refused without."""
    convert(model, tmp_path / "plain")
    convert(model, mounted)
    assert files(mounted) == files(tmp_path / "plain")
    assert sorted(path.name for path in mounted.iterdir()) == [
        "config.json",
        *WRITTEN,
        "lost+found",
        "model.safetensors",
    ]
    line = refusal("convert", "--model_path", model, "--save_path", mounted)
    assert line == f"{mounted}: already there; give --overwrite to replace it, or write elsewhere"
    convert(model, mounted, "--overwrite", "--max_shard_size", 300)
    convert(model, tmp_path / "sharded", "--max_shard_size", 300)
    assert files(mounted) == files(tmp_path / "sharded")


WRITTEN = ["convert_report.json"]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_stopped_at_any_step_of_moving_out(model, tmp_path, mounted, monkeypatch, overwrite):
    """The same command, without --overwrite too, gets to the end; until then config.json and weights are of one
    model."""
    convert(model, tmp_path / "plain", "--max_shard_size", 300)
    convert(model, tmp_path / "old", "--dtype", "float32")
    for at in range(1, 100):
        for path in mounted.iterdir():
            if path.name != "lost+found":
                remove(path)
        if overwrite:
            convert(model, mounted, "--dtype", "float32")
        reached = stop_at(at, monkeypatch, lambda: convert(model, mounted, "--max_shard_size", 300, *overwrite))
        if (mounted / "config.json").exists():
            whole = {name: data for name, data in files(mounted).items() if not name.startswith(".")}
            assert whole in (files(tmp_path / "plain"), files(tmp_path / "old"))
        if not reached:
            break
        untouched = overwrite and whole_old(mounted, tmp_path / "old")
        convert(model, mounted, "--max_shard_size", 300, *(["--overwrite"] if untouched else []))
        assert files(mounted) == files(tmp_path / "plain")
        assert not [path for path in mounted.iterdir() if path.name.startswith(".")]
    else:
        pytest.fail("never ran to its end")
    assert at > 10


def whole_old(place: Path, old: Path) -> bool:
    return {name: data for name, data in files(place).items() if not name.startswith(".")} == files(old)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def stop_at(at: int, monkeypatch, call) -> bool:
    """Call, and interrupt it before the at-th rename or removal within publishing -> whether it got that far."""
    from common.shards import publish, staging

    count = [0]
    real_move = staging.move

    def counted(real):
        def step(*arguments, **options):
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return step

    def move(part, final):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", counted(os.rename))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            patch.setattr(Path, "rmdir", counted(Path.rmdir))
            real_move(part, final)

    monkeypatch.setattr(publish, "move", move)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        monkeypatch.setattr(publish, "move", real_move)
    return False


def test_mount_points_are_seen(tmp_path):
    """The root, /proc, and every line of the kernel's own list; an ordinary directory is none."""
    from common.shards.places import _mount_points, cannot_be_renamed

    assert cannot_be_renamed(Path("/")) and cannot_be_renamed(Path("/proc"))
    assert {"/", "/proc"} <= _mount_points()
    assert not cannot_be_renamed(tmp_path) and not cannot_be_renamed(tmp_path / "no")


@pytest.mark.slow
def test_a_real_mount_point(model, tmp_path):
    """A tmpfs, and a directory bound from the same disk (docker -v), which os.path.ismount does not see."""
    import subprocess
    import sys

    for name, mount in (("t", "mount -t tmpfs none"), ("b", f"mount --bind {tmp_path}/there")):
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / name).mkdir()
        command = f"{sys.executable} {ROOT}/convert_dtype.py --model_path {model} --save_path {tmp_path}/{name}"
        script = f"{mount} {tmp_path}/{name} && {command} && cp -r {tmp_path}/{name} {tmp_path}/{name}-seen"
        done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            pytest.skip(f"no mounts of one's own here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        convert(model, tmp_path / f"{name}-plain")
        assert files(tmp_path / f"{name}-seen") == files(tmp_path / f"{name}-plain")
