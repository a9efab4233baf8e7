"""Inputs that do not fit, numbers that do not, places that are taken: one exact line each, and nothing left behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import chain, extract, files, load, prune_arguments, refusal, run, write
from conftest import ROOT
from safetensors.torch import load_file, save_file

Q, HEAD, EMBED = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
INV_FREQ = "model.layers.0.rotary_emb.inv_freq"
NAN, INF = float("nan"), float("inf")
NOT_FINITE = "holds NaN or infinity; take an undamaged copy of the model"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A chain up to the task vectors; copied, never touched."""
    return chain(tmp_path_factory.mktemp("made"), buffers={INV_FREQ: torch.ones(3)})


@pytest.fixture
def chained(made, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "x"))


def change(directory: Path, **tensors) -> None:
    """Replace tensors of a checkpoint of one file; None removes one."""
    path = directory / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: t for name, t in held.items() if t is not None}, path, metadata={"format": "pt"})


def put(who: str, name: str, value: float, dtype=None):
    """A spoiler that sets one element of a tensor of folder/who, in another dtype if given."""

    def spoil(folder: Path) -> None:
        tensor = load(folder / who)[name].clone().to(dtype or torch.float16)
        tensor.view(-1)[2] = value
        change(folder / who, **{name: tensor})

    return spoil


def replace(who: str, name: str, tensor):
    """A spoiler that replaces a tensor of folder/who, or removes it."""
    return lambda folder: change(folder / who, **{name: tensor})


def together(*spoilers):
    """A spoiler that does several things."""
    return lambda folder: [spoil(folder) for spoil in spoilers]


def text(path: str, content: str):
    """A spoiler that writes a text file."""
    return lambda folder: (folder / path).write_text(content)


def arguments(script: str, folder: Path, *more: str) -> list:
    """The usual arguments of a script in a folder that chain made."""
    if script == "convert":
        return ["--model_path", folder / "base", "--save_path", folder / "out", *more]
    if script == "extract":
        return [
            "--finetuned_model_path",
            folder / "a",
            "--base_model_path",
            folder / "base",
            "--save_path",
            folder / "out",
            *more,
        ]
    return prune_arguments(folder, "--base_model_path", folder / "base", *more)


RELATED = "is {d}/a a fine-tuned model of {d}/base?"
ONLY = "5 of 6 tensors agree; only in {{d}}/{0}: {1} (1 tensor); leave it out with --skip '{1}'"
BEYOND = "convert to bfloat16 or float32, or accept the nearest finite value with --clamp"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
FLOATING = "take versions of both models in floating point"
CASES = {
    # what does not fit
    "vocabulary": (
        together(replace("a", HEAD, torch.ones(13, 7)), replace("a", EMBED, torch.ones(13, 7))),
        ["extract"],
        f"tensor '{HEAD}' is [13, 7] in {{d}}/a but [11, 7] in {{d}}/base; the vocabularies differ: extract with "
        "--vocabulary common, which subtracts the rows of the tokens that both have and keeps {d}/base's tokenizer, "
        "or take a fine-tuned model with {d}/base's own",
    ),
    "shape": (
        replace("a", Q, torch.ones(7, 8)),
        ["extract"],
        f"tensor '{Q}' is [7, 8] in {{d}}/a but [7, 7] in {{d}}/base; {RELATED}",
    ),
    "flattened": (
        replace("a", Q, torch.ones(49)),
        ["extract"],
        f"tensor '{Q}' is [49] in {{d}}/a but [7, 7] in {{d}}/base; {RELATED}",
    ),
    "missing": (replace("a", Q, None), ["extract"], ONLY.format("base", Q)),
    "missing in the base": (
        replace("base", Q, None),
        ["extract"],
        ONLY.format("a", Q),
    ),
    "a head that is not tied": (
        replace("a", HEAD, None),
        ["extract"],
        ONLY.format("base", HEAD),
    ),
    "integers": (
        replace("a", Q_BIAS, torch.ones(5, dtype=torch.int32)),
        ["extract"],
        f"tensor '{Q_BIAS}' is I32 in {{d}}/a but F16 in {{d}}/base; {FLOATING}",
    ),
    "integers in the base": (
        replace("base", Q_BIAS, torch.ones(5, dtype=torch.int8)),
        ["extract"],
        f"tensor '{Q_BIAS}' is F16 in {{d}}/a but I8 in {{d}}/base; {FLOATING}",
    ),
    "quantised weights": (
        replace("a", Q, torch.ones(7, 7, dtype=torch.int8)),
        ["extract"],
        f"tensor '{Q}' is I8 in {{d}}/a: its weights are quantised; take an unquantised version of the model",
    ),
    "a tied head that differs": (
        together(
            replace("base", HEAD, None),
            text("base/config.json", '{"tie_word_embeddings": true}'),
            text("a/config.json", '{"tie_word_embeddings": true}'),
        ),
        ["extract"],
        f"tensor '{HEAD}' in {{d}}/a/model.safetensors differs from '{EMBED}', to which the base ties it; "
        f"take a base that has a head of its own, or leave it out with --skip '{HEAD}'",
    ),
    # numbers
    **{
        f"{value} to {script}: {who}": (
            put(who, Q, value),
            [script, *more],
            f"tensor '{Q}' in {{d}}/{who}/model.safetensors: {NOT_FINITE}",
        )
        for value in (NAN, INF, -INF)
        for script, who, *more in (
            ("convert", "base"),
            ("extract", "a"),
            ("extract", "base"),
            ("prune", "base"),
            ("prune", "va"),
            ("prune", "vb"),
            ("prune", "vb", "--save_format", "task_vector"),
            ("prune", "va", "--pruning_method", "random"),
            ("prune", "vb", "--pruning_method", "magnitude"),
        )
    },
    "overflow": (
        together(put("base", Q, 1e6, torch.float32), put("base", HEAD, -65520.0, torch.float32)),
        ["convert"],
        f"2 tensor(s) of {{d}}/base hold values beyond the largest float16: '{HEAD}', '{Q}'; {BEYOND}",
    ),
    "overflow in a difference": (
        together(put("a", Q, 6e4), put("base", Q, -6e4)),
        ["extract"],
        f"tensor '{Q}': a value of {{d}}/a/model.safetensors or {{d}}/base/model.safetensors, or their difference, is "
        "beyond the largest float16; extract with --dtype bfloat16 or float32",
    ),
    "overflow in rounding": (
        put("a", Q, 7e4, torch.float32),
        ["extract"],
        f"tensor '{Q}': a value of {{d}}/a/model.safetensors or {{d}}/base/model.safetensors, or their difference, is "
        "beyond the largest float16; extract with --dtype bfloat16 or float32",
    ),
    # where vectors come from
    "no task vector": (
        lambda folder: (folder / "va" / "task_vector.json").unlink(),
        ["prune"],
        "{d}/va: no task_vector.json in it, so it is not a task vector; make one with extract_task_vector_7b.py",
    ),
    "no sound task_vector.json": (
        text("vb/task_vector.json", "{}"),
        ["prune"],
        "{d}/vb/task_vector.json: not as extract_task_vector_7b.py writes it; extract the vector again",
    ),
    "hashes that are none": (
        text("vb/task_vector.json", '{"tensors": {"a": 3}, "base_model_path": "x", "hash": "xxh3_128"}'),
        ["prune"],
        "{d}/vb/task_vector.json: not as extract_task_vector_7b.py writes it; extract the vector again",
    ),
    "a base path of two lines": (
        text("va/task_vector.json", '{"tensors": {}, "base_model_path": "a\\nb", "hash": "xxh3_128"}'),
        ["prune"],
        "{d}/va/task_vector.json: not as extract_task_vector_7b.py writes it; extract the vector again",
    ),
    "hashes of other tensors": (
        replace("va", "x", torch.ones(1)),
        ["prune"],
        "tensor 'x': in only one of {d}/va/task_vector.json and the weights beside it; extract the vector again",
    ),
    "wrong base": (
        put("base", Q, 1.5),
        ["prune"],
        f"tensor '{Q}' in {{d}}/base/model.safetensors: not the base that {{d}}/va was extracted from; "
        "give that one as --base_model_path, or extract the vector again",
    ),
    "wrong buffer in the base": (
        put("base", INV_FREQ, 2.0, torch.float32),
        ["prune"],
        f"tensor '{INV_FREQ}' in {{d}}/base/model.safetensors: not the base that {{d}}/va was extracted from; "
        "give that one as --base_model_path, or extract the vector again",
    ),
    "flipped bit": (
        put("vb", Q, 0.0),
        ["prune"],
        f"tensor '{Q}' in {{d}}/vb: not the bytes that were extracted; extract the vector again",
    ),
    "flipped bit, as a vector": (
        put("va", Q, 0.0),
        ["prune", "--save_format", "task_vector"],
        f"tensor '{Q}' in {{d}}/va: not the bytes that were extracted; extract the vector again",
    ),
    # places
    "into the input": (
        lambda folder: None,
        ["convert", "--save_path", "{d}/base/out"],
        "{d}/base/out: output and {d}/base overlap; give the output a directory of its own",
    ),
    "over the input": (
        lambda folder: None,
        ["extract", "--save_path", "{d}/a", "--overwrite"],
        "{d}/a: output and {d}/a overlap; give the output a directory of its own",
    ),
    "around the input": (
        lambda folder: None,
        ["convert", "--save_path", "{d}", "--overwrite"],
        "{d}: output and {d}/base overlap; give the output a directory of its own",
    ),
    "through a link": (
        lambda folder: (folder / "link").symlink_to(folder / "base"),
        ["convert", "--save_path", "{d}/link", "--overwrite"],
        "{d}/link: output and {d}/base overlap; give the output a directory of its own",
    ),
    "both outputs in one": (
        lambda folder: None,
        ["prune", "--save_directory2", "{d}/pa"],
        "{d}/pa: output and {d}/pa overlap; give the output a directory of its own",
    ),
    "taken": (
        text("out", "a file"),
        ["convert"],
        "{d}/out: already there; give --overwrite to replace it, or write elsewhere",
    ),
    "the second is taken": (
        text("pb", "a file"),
        ["prune"],
        "{d}/pb: already there; give --overwrite to replace it, or write elsewhere",
    ),
    "a strange .part": (
        together(lambda folder: (folder / "out.part").mkdir(), text("out.part/mine", "")),
        ["convert"],
        "{d}/out.part: left by another job (no record of a job in it); finish that job with its own command, "
        "delete the directory, or give --overwrite to start afresh",
    ),
    "a device that is not there": (lambda folder: None, ["prune", "--device", "nonsense"], None),
}


@pytest.mark.parametrize("spoil, command, line", CASES.values(), ids=CASES)
def test_refused(chained, spoil, command, line):
    """The exact line; nothing new in the folder; what was there before is as it was."""
    spoil(chained)
    before, places = files(chained), set(chained.rglob("*"))
    got = refusal(
        command[0], *arguments(command[0], chained, *(part.replace("{d}", str(chained)) for part in command[1:]))
    )
    if line is None:
        assert got.startswith("--device nonsense: not usable here (") and got.endswith("or a torch built for it")
    else:
        assert got == line.replace("{d}", str(chained))
    left = {name for name in files(chained) if ".part/.run/" not in name}
    assert left == before.keys() and all(files(chained)[name] == before[name] for name in before)
    new = {path.relative_to(chained).parts[0] for path in set(chained.rglob("*")) - places}
    assert all(name.endswith(".part") for name in new), new


# --- numbers that can be had another way ----------------------------------------------------------


def test_clamp(chained, capsys):
    """--clamp gives the largest finite value of the sign, and says where."""
    together(put("base", Q, 1e6, torch.float32), put("base", HEAD, -65520.0, torch.float32))(chained)
    run("convert", *arguments("convert", chained, "--clamp"))
    out = load(chained / "out")
    assert (out[Q].max(), out[HEAD].min()) == (65504.0, -65504.0)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "306 values: 2 changed by rounding, 0 of them became zero",
        f"clamped: values in 2 tensor(s), the first '{HEAD}'",
    ]


def test_many_overflows_are_summed_up(tmp_path):
    """Of many tensors eight are named."""
    write(tmp_path / "base", {f"w{i}": torch.tensor([7e4]) for i in range(10)})
    names = ", ".join(f"'w{i}'" for i in range(8))
    line = refusal("convert", "--model_path", tmp_path / "base", "--save_path", tmp_path / "out")
    assert line == f"10 tensor(s) of {tmp_path}/base hold values beyond the largest float16: {names} and more; {BEYOND}"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("save_format", ["model", "task_vector"])
def test_rescale_overflows(chained, save_format):
    """30000 kept and multiplied by 4 is beyond float16; without --rescale it is not."""
    put("a", Q, 30_000.0)(chained)
    shutil.rmtree(chained / "va")
    extract(chained / "a", chained / "base", chained / "va")
    more = ["--save_format", save_format]
    line = refusal("prune", *arguments("prune", chained, "--rescale", *more))
    assert line == (
        f"tensor '{Q}' of {chained}/va: a result is beyond the largest float16; use base and vectors in bfloat16 or "
        "float32, or no --rescale"
    )
    assert not list(chained.glob("p*"))
    run("prune", *arguments("prune", chained, *more))


# --- the base that extraction recorded ------------------------------------------------------------


def test_the_base_has_gone(tmp_path):
    """The line says where the path came from and which flag helps; then that flag does."""
    folder = chain(tmp_path)
    (folder / "base").rename(folder / "moved")
    line = refusal("prune", *prune_arguments(folder))
    assert line == (
        f"{folder}/base: no such directory; check the path, or give a Hugging Face Hub id such as org/name "
        f"(recorded in {folder}/va; say where it is now with --base_model_path)"
    )
    run("prune", *prune_arguments(folder, "--base_model_path", folder / "moved"))


def test_vectors_of_different_bases(chained):
    put("base", Q, 1.5)(chained)
    shutil.rmtree(chained / "vb")
    extract(chained / "b", chained / "base", chained / "vb")
    assert refusal("prune", *prune_arguments(chained)) == (
        f"tensor '{Q}': {chained}/va and {chained}/vb were extracted from different bases; extract both from the same "
        "one"
    )


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["convert", "prune"])
def test_a_disk_too_small(chained, monkeypatch, script):
    """Compared before anything is written; the sizes are in the line."""
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=100))
    line = refusal(script, *arguments(script, chained))
    assert line == f"{chained}: 0.00 GB are needed there and 0.00 GB are free; free some space or write elsewhere"
    assert not list(chained.glob("p[ab]")) and not (chained / "out").exists()


def test_overwrite_replaces_and_only_that(chained):
    """A directory or a file under the name is replaced; neighbours with like names are not touched."""
    for neighbour in ("out.old", "out.bak"):
        (chained / neighbour).mkdir()
        (chained / neighbour / "mine").write_text("mine")
    run("convert", *arguments("convert", chained))
    first = files(chained / "out")
    (chained / "out" / "stale").write_text("stale")
    run("convert", *arguments("convert", chained, "--overwrite"))
    assert files(chained / "out") == first
    shutil.rmtree(chained / "out")
    (chained / "out").write_text("a file")
    run("convert", *arguments("convert", chained, "--overwrite"))
    assert files(chained / "out") == first
    assert {p.name for p in chained.glob("out*")} == {"out", "out.old", "out.bak"}
    assert (chained / "out.old" / "mine").read_text() == "mine"


def test_a_file_where_a_directory_is_needed(chained):
    """The operating system's own words, with the path, in one line."""
    (chained / "file").write_text("")
    line = refusal("convert", *arguments("convert", chained, "--save_path", chained / "file" / "out"))
    assert line.startswith(f"{chained}/file/") and "Not a directory" in line


# --- as a process ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ["convert_dtype.py", "extract_task_vector_7b.py", "prune_task_vector_7b.py"])
def test_exit_codes_and_one_line(chained, script):
    """Exit 2 on usage; exit 1 and a last line on bad data, also where the progress bar was running; no traceback."""
    put("base", Q, NAN)(chained)
    name = script.split("_")[0]

    def start(*flags):
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, flags)],
            capture_output=True,
            text=True,
            cwd=chained,
            env=os.environ,
        )

    done = start(*arguments(name, chained))
    assert done.returncode == 1
    last = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert last == f"error: tensor '{Q}' in {chained}/base/model.safetensors: {NOT_FINITE}"
    assert "Traceback" not in done.stderr and not list(chained.glob("out*")) + list(chained.glob("p*"))
    assert start("--nonsense").returncode == 2


def test_dry_run_checks_everything_and_writes_nothing(chained, capsys):
    """The plan, with bytes read and written; a refusal comes here too."""
    before = files(chained)
    run("prune", *arguments("prune", chained, "--dry_run"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reads"] * 3 + ["writes"] * 2 + ["disk", "memory"]
    assert files(chained) == before
    change(chained / "vb", **{Q: None})
    assert "in only one of" in refusal("prune", *arguments("prune", chained, "--dry_run"))
