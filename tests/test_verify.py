"""--verify: every byte of every tensor counts, in each kind of directory that the scripts write."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from checkpoints import chain, files, load, prune, prune_arguments, refusal, run, usage_error
from safetensors.torch import save_file

import merge_and_evaluate_7b
import prune_task_vector_7b
from common.exits import run as run_main
from common.shards.checkpoint import open_checkpoint
from common.shards.documents import write_json
from common.shards.headers import read_headers
from merge_and_evaluate.merging import already_merged, pruned_before

KINDS = {
    "cv": "convert_report.json",
    "va": "task_vector.json",
    "pa": "prune_report.json",
    "ta": "prune_report.json",
    "merged": "merge_report.json",
}
RECIPE_TEXT = """
merge_method: task_arithmetic
base_model: {0}/base
models: [{{model: {0}/pa, parameters: {{weight: 1.0}}}}]
dtype: float32
out_dtype: float16
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A task vector, a pruned model in several files, a pruned task vector and a merged model."""
    folder = chain(tmp_path_factory.mktemp("verify"))
    run("convert", "--model_path", folder / "base", "--save_path", folder / "cv", "--max_shard_size", 300)
    run("prune", *prune_arguments(folder, "--max_shard_size", 300))
    prune([folder / "va"], [folder / "ta"], "--save_format", "task_vector")
    merged = folder / "merged"
    shutil.copytree(folder / "pa", merged)
    (merged / "prune_report.json").unlink()
    digests = {name: digest_of(tensor) for name, tensor in load(merged).items()}
    (merged / "merge_report.json").write_text(json.dumps({"identity": "x", "tensors": digests}))
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """copy(kind) -> a copy of a directory that may be harmed."""
    return lambda kind: shutil.copytree(written / kind, tmp_path / kind)


def digest_of(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def verify_refusal(*directories) -> str:
    """The line of both scripts, which must be one."""
    line = refusal("prune", "--verify", *directories)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: merge_and_evaluate_7b.main(["--verify", *map(str, directories)]))
    assert stop.value.code == f"error: {line}"
    return line


def flip(directory: Path, name: str, at: int = 0) -> Path:
    """Invert byte `at` of a tensor; returns its file."""
    tensor = next(t for t in read_headers(directory) if t.name == name)
    with open(tensor.path, "r+b") as file:
        file.seek(tensor.offset + at % tensor.nbytes)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))
    return tensor.path


# --- sound ----------------------------------------------------------------------------------------


def test_what_was_written_is_sound(written, capsys):
    before = {kind: files(written / kind) for kind in KINDS}
    run("prune", "--verify", *(written / kind for kind in KINDS))
    lines = capsys.readouterr().out.splitlines()[: len(KINDS)]
    assert lines == [f"{written / kind}: 6 tensors, 0.000 GB, every byte of them as it was written" for kind in KINDS]
    assert {kind: files(written / kind) for kind in KINDS} == before
    assert sum(path.suffix == ".safetensors" for path in (written / "pa").iterdir()) > 1


def test_a_model_that_mergekit_merged_is_sound(models, tmp_path, capsys, monkeypatch):
    """The real record of a real merge, and a byte of it that changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "wild", tmp_path / "pa")
    shutil.copytree(models / "base", tmp_path / "base")
    Path("recipe.yml").write_text(RECIPE_TEXT.format("."))
    flags = ["--engine", "mergekit", "--merge_only"]
    merge_and_evaluate_7b.main(["--recipe", "recipe.yml", "--save_path", "merged", *flags])
    merge_and_evaluate_7b.main(["--verify", "merged"])
    assert "GB, every byte of them as it was written\nmerged: not known: whether its inputs" in capsys.readouterr().out
    path = flip(Path("merged"), "model.norm.weight")
    assert verify_refusal("merged").startswith(f"tensor 'model.norm.weight' in {path}: not the bytes that merge_report")


@pytest.mark.slow
def test_a_large_record_is_read(copy, tmp_path):
    """A model of 69,000 tensors has a prune_report.json of 28 MB."""
    for kind, name in KINDS.items():
        directory = copy(kind)
        with open(directory / name, "a") as file:
            file.write(" " * 30_000_000)
        run("prune", "--verify", directory)
    prune([tmp_path / "va"], [tmp_path / "again"], "--save_format", "task_vector", "--n", 1, "--m", 4)
    run("prune", "--plot_reports", tmp_path / "pa", "--plot_path", tmp_path / "pa.svg")
    assert pruned_before((open_checkpoint(str(tmp_path / "pa")),)) and not already_merged(tmp_path / "merged", "y")


def test_a_large_report_is_printed(written, tmp_path, monkeypatch):
    """By the job that wrote it."""

    def write_large(path, value):
        write_json(path, value | {"padding": "x" * 30_000_000})

    monkeypatch.setattr(prune_task_vector_7b, "write_json", write_large)
    prune([written / "va"], [tmp_path / "out"])


# --- damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found(copy, kind, at):
    directory = copy(kind)
    path = flip(directory, "model.embed_tokens.weight", at)
    assert verify_refusal(directory) == (
        f"tensor 'model.embed_tokens.weight' in {path}: not the bytes that {KINDS[kind]} recorded; "
        "write or copy the directory again"
    )


def test_the_first_of_several_is_named(copy):
    directory = copy("pa")
    names = [tensor.name for tensor in read_headers(directory)]
    for name in (names[4], names[1], names[2]):
        flip(directory, name)
    assert verify_refusal(directory).startswith(f"tensor {names[1]!r} in ")
    assert "(and 2 more): not the bytes" in verify_refusal(directory)


def test_sound_ones_before_a_damaged_one_are_told(written, copy, capsys):
    directory = copy("pa")
    flip(directory, "model.norm.weight")
    verify_refusal(written / "va", directory, written / "pa")
    line = f"{written / 'va'}: 6 tensors, 0.000 GB, every byte of them as it was written\n"  # and nothing of inputs
    assert capsys.readouterr().out == 2 * line  # once by each script


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_found(copy, kind):
    directory = copy(kind)
    path = sorted(directory.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in verify_refusal(directory) and "truncated" in verify_refusal(directory)


def test_a_file_cut_while_it_is_read_is_found(copy, monkeypatch):
    """The headers were sound when they were read."""
    from common.shards import verify

    directory = copy("va")
    tensors, records = verify.open_directory(str(directory))
    monkeypatch.setattr(verify, "open_directory", lambda *_: (tensors, records))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "the file ends within it" in verify_refusal(directory)


def replace_weights(directory: Path, tensors: dict) -> None:
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_missing_or_added_is_refused(copy, kind):
    directory = copy(kind)
    tensors = load(directory)
    replace_weights(directory, tensors | {"extra": torch.zeros(2)})
    assert verify_refusal(directory) == (
        f"tensor 'extra' in {directory / 'model.safetensors'}: not in {KINDS[kind]}, so it was added later; "
        "write or copy the directory again"
    )
    tensors.pop("lm_head.weight")
    replace_weights(directory, tensors)
    assert verify_refusal(directory) == (
        f"tensor 'lm_head.weight': in {directory / KINDS[kind]} but not in the weights beside it; "
        "write or copy the directory again"
    )


def test_other_files_of_the_same_tensors_are_sound(copy):
    """The hashes are the tensors': how they are cut into files does not matter."""
    directory = copy("pa")
    replace_weights(directory, load(directory))
    run("prune", "--verify", directory)


# --- inputs ---------------------------------------------------------------------------------------


def test_a_base_of_elsewhere_is_known_by_what_was_pruned_from_it(written, tmp_path, capsys):
    """A base with no record of its own: recognised by its hashes, called another one if a bit of it differs."""
    base = Path(shutil.copytree(written / "cv", tmp_path / "base"))
    (base / "convert_report.json").unlink()
    run("prune", "--verify", base, written / "pa")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{base}: ") and lines[1].endswith("read; it has no record of its own")
    assert f"{written / 'pa'}: its base is {base}, verified too" in lines
    assert "no merge_report.json, " in verify_refusal(base)

    tensors = load(base)
    tensors["lm_head.weight"][0, 0] += 1
    replace_weights(base, tensors)
    run("prune", "--verify", written / "pa", base)
    assert "by its hashes none of those verified here" in capsys.readouterr().out


def test_what_is_not_known_of_inputs(written, capsys):
    """A vector's base is recognised by its hashes, wherever it lies; what was not read is named."""
    run("prune", "--verify", written / "va", written / "pa", written / "cv")
    assert capsys.readouterr().out.splitlines()[3:] == [
        f"{written / 'va'}: its base is {written / 'cv'}, verified too",
        f"{written / 'va'}: not known: whether its inputs are as they were: {written / 'a'}",
        f"{written / 'pa'}: its base is {written / 'cv'}, verified too",
        f"{written / 'cv'}: not known: whether its inputs are as they were: {written / 'base'}",
    ]
    run("prune", "--verify", written / "va")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{written / 'va'}: not known: whether its inputs are as they were: {written / 'base'} (by its hashes none of "
        f"those verified here), {written / 'a'}"
    ]


def test_a_vector_is_known_wherever_it_was_named_from(written, tmp_path, capsys, monkeypatch):
    """A relative path, given twice, and verified from elsewhere; a report without the whole path is read as before."""
    monkeypatch.chdir(written)
    prune(["va", "va"], [tmp_path / "1", tmp_path / "2"], "--pruning_method", "random")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run("prune", "--verify", written / "cv", written / "va", "1", "2")
    said = capsys.readouterr().out
    assert "1: its base is " in said and "1: not known" not in said and "2: not known" not in said
    report = json.loads(Path("1/prune_report.json").read_text())
    assert report["vector"] == "va (1)" and report.pop("vector_path") == str(written / "va")
    Path("1/prune_report.json").write_text(json.dumps(report))
    run("prune", "--verify", "1")
    assert capsys.readouterr().out.endswith("none of those verified here), va (1)\n")


def test_another_base_is_not_taken_for_it(written, copy, capsys):
    """The same names and the recorded path, but other bytes: not the base."""
    from checkpoints import state, write

    other = write(copy("cv").parent / "other", state(9))
    run("convert", "--model_path", other, "--save_path", other.with_name("base"))
    run("prune", "--verify", written / "va", other.with_name("base"))
    assert "its base is" not in capsys.readouterr().out


# --- nothing to compare with ----------------------------------------------------------------------


def test_a_directory_without_record_or_weights_is_refused(written, tmp_path, copy):
    assert verify_refusal(written / "base") == (
        f"{written / 'base'}: no merge_report.json, prune_report.json, task_vector.json, convert_report.json in it, "
        "so nothing says what its bytes were; only what convert, extract, prune and merge wrote can be verified"
    )
    assert verify_refusal(tmp_path / "no") == (
        f"{tmp_path / 'no'}: no such directory; give one that convert, extract, prune or merge wrote"
    )
    directory = copy("va")
    (directory / "model.safetensors").unlink()
    assert (
        verify_refusal(directory)
        == f"{directory}: no weights beside task_vector.json; write or copy the directory again"
    )


def test_hashes_where_entries_belong_are_refused(copy):
    """And the other way round: a record is as its own script writes it."""
    for kind, name in KINDS.items():
        directory = copy(kind)
        content = json.loads((directory / name).read_text())
        as_hashes = {tensor: digest_of(value) for tensor, value in load(directory).items()}
        is_hash = isinstance(content["tensors"]["lm_head.weight"], str)
        content["tensors"] = {n: {"hash": h, "vector": h} for n, h in as_hashes.items()} if is_hash else as_hashes
        (directory / name).write_text(json.dumps(content))
        assert verify_refusal(directory).startswith(f"{directory / name}: holds no hash of every tensor")


@pytest.mark.parametrize("models", [3, [{"model": "a"}]])
def test_models_that_are_none_are_no_traceback(copy, models):
    path = copy("merged") / "merge_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"models": models}))
    run("prune", "--verify", path.parent)


DAMAGED = ["[]", "{}", '{"tensors": 1}', '{"tensors": {"model.norm.weight": {}}}', '{"tensors": {"a": [1]}}']


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_is_none_is_refused(copy, kind, content):
    directory = copy(kind)
    (directory / KINDS[kind]).write_text(content)
    assert verify_refusal(directory).startswith(f"{directory / KINDS[kind]}: ")


def test_verify_goes_with_nothing_else(capsys):
    assert usage_error(capsys, "prune", "--verify", "a", "--n", 2) == "--verify does not go with --n"
    with pytest.raises(SystemExit) as stop:
        merge_and_evaluate_7b.main(["--verify", "a", "--merge_only"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --verify does not go with --merge_only\n")
