"""Jobs that meet what they do not expect: nothing is lost, nothing mixed, and one line says so."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import chain, extract, files, load, prune, prune_arguments, refusal, run, state, write
from word_models import WORDS, model, tokenizer

import convert_dtype
from common.errors import DataError
from common.exits import _allow_many_files, _one_line
from common.shards import hub, job, processes, publish
from common.shards.adapters import is_adapter
from common.shards.hub import is_hub_id
from common.shards.names import left_over
from common.shards.places import REFUSED, check_places
from common.shards.staging import staged_directory
from merge_and_evaluate.scoring import check_one_process

Q = "model.layers.0.self_attn.q_proj.weight"


def stopped_before_publishing(monkeypatch, *command) -> None:
    """Run a script up to its renames, as a signal there would leave it."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(*command)


# --- what a job is known by -----------------------------------------------------------------------


def test_another_tokenizer_is_another_job(tmp_path, monkeypatch):
    """--vocabulary common: tokenizers decide which rows are subtracted, so a stopped job with another is refused."""
    model(tmp_path / "base", "MistralForCausalLM", WORDS, 0)
    model(tmp_path / "tuned", "MistralForCausalLM", [*WORDS, "<pad>"], 1)
    paths = ["--finetuned_model_path", tmp_path / "tuned", "--base_model_path", tmp_path / "base"]
    command = ["extract", *paths, "--save_path", tmp_path / "v", "--vocabulary", "common"]
    right = {path.name: path.read_bytes() for path in (tmp_path / "tuned").glob("token*")}
    tokenizer([*WORDS[:4], "wrong", *WORDS[5:], "<pad>"]).save_pretrained(tmp_path / "tuned")
    stopped_before_publishing(monkeypatch, *command)
    for name, data in right.items():
        (tmp_path / "tuned" / name).write_bytes(data)
    assert "left by another job (common: " in refusal(*command)
    run(*command, "--overwrite")
    assert load(tmp_path / "v")["lm_head.weight"][4].any(), "a row of a token that both have"


def test_a_shard_that_was_cut_short_is_written_again(tmp_path, monkeypatch):
    """A power cut, a copied .part: a file that is not as long as planned is not complete."""
    write(tmp_path / "model", state())
    command = ["convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--max_shard_size", 300]
    stopped_before_publishing(monkeypatch, *command)
    shard = sorted((tmp_path / "out.part").glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 16)
    run(*command)
    assert load(tmp_path / "out").keys() == state().keys()


def test_what_the_source_no_longer_has_is_not_published(tmp_path, monkeypatch):
    """Stopped after files were copied, and one of them deleted since: the job is the same, its weights are."""
    model = write(tmp_path / "model", state())
    (model / "added_tokens.json").write_text("{}")
    command = ["convert", "--model_path", model, "--save_path", tmp_path / "out"]
    stopped_before_publishing(monkeypatch, *command)
    assert (tmp_path / "out.part" / "added_tokens.json").is_file()
    (model / "added_tokens.json").unlink()
    run(*command)
    assert sorted(files(tmp_path / "out")) == ["config.json", "convert_report.json", "model.safetensors"]


# --- nothing is deleted without --overwrite -------------------------------------------------------


def test_what_appears_while_a_job_runs_stays(tmp_path, monkeypatch):
    """A directory of the output's name, made in the meantime: the line names it, and the finished work stays, too."""
    write(tmp_path / "model", state())
    command = ["convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out"]
    begun, out = job._claim, tmp_path / "out"

    def claim(*given):
        held = begun(*given)
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        return held

    with monkeypatch.context() as patch:
        patch.setattr(job, "_claim", claim)
        line = refusal(*command)
    assert line == (
        f"{out}: appeared while this job ran, and would be deleted; move it away; fix that and run the same command "
        "again"
    )
    assert files(out) == {"mine.txt": b"mine"}
    out.rename(tmp_path / "away")
    monkeypatch.setattr(job.stream, "run", lambda *_: pytest.fail("streamed again"))
    run(*command)
    assert load(out).keys() == state().keys()


@pytest.mark.parametrize("ending", ["part", "part.old"])
def test_an_input_under_a_name_of_the_work(tmp_path, ending):
    """<save_path>.part is emptied and renamed, .part.old is deleted: neither may be an input or another output."""
    write(tmp_path / f"x.{ending}", state())
    command = ["convert", "--model_path", tmp_path / f"x.{ending}", "--save_path", tmp_path / "x", "--overwrite"]
    assert refusal(*command).startswith(f"{tmp_path}/x: output and {tmp_path}/x.{ending} overlap")
    assert load(tmp_path / f"x.{ending}")
    with pytest.raises(DataError, match="overlap"):
        check_places([], [tmp_path / f"x.{ending}", tmp_path / "x"])


def test_work_of_another_job_is_not_emptied(tmp_path, monkeypatch):
    """mergekit's directory is filled anew each time, which its own leftovers alone may be."""
    write(tmp_path / "model", state())
    command = ["convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out"]
    stopped_before_publishing(monkeypatch, *command)
    (tmp_path / "other.part").mkdir()
    (tmp_path / "other.part" / "mine.txt").write_text("mine")
    for name in ("out", "other"):
        before = files(tmp_path / f"{name}.part")
        with pytest.raises(DataError, match=f"{name}.part: left by another job"):  # noqa: SIM117
            with staged_directory(tmp_path / name, overwrite=False):
                pytest.fail("emptied")
        after = files(tmp_path / f"{name}.part")
        assert before.items() <= after.items() and after.keys() - before.keys() <= {".run/lock"}
    with staged_directory(tmp_path / "out", overwrite=True) as part:
        (part / "new.txt").write_text("new")
    assert files(tmp_path / "out") == {"new.txt": b"new"}


def test_what_a_killed_merge_left_is_its_own(tmp_path):
    (tmp_path / "out.part" / ".run").mkdir(parents=True)
    (tmp_path / "out.part" / ".run" / "lock").touch()
    (tmp_path / "out.part" / "half.safetensors").write_bytes(b"half")
    with staged_directory(tmp_path / "out", overwrite=False) as part:
        assert [path.name for path in part.iterdir()] == [".run"]


def test_what_a_refused_job_left_is_nobodys(tmp_path):
    """Another process than the main one met bad data: a merge by mergekit may take the place, too."""
    run_of_it = tmp_path / "out.part" / ".run"
    run_of_it.mkdir(parents=True)
    (run_of_it / "run.json").write_text("{}")
    (run_of_it / REFUSED).touch()
    (tmp_path / "out.part" / "model.safetensors").write_bytes(b"half")
    with staged_directory(tmp_path / "out", overwrite=False) as part:
        assert [path.name for path in part.iterdir()] == [".run"]


@pytest.mark.parametrize("window", ["before the record moves", "after"])
def test_a_half_published_mount_point_is_its_jobs(tmp_path, window):
    """Stopped while files were moved to it: another job is refused, where all of them have left .part, too."""
    out, run_json = tmp_path / "out", json.dumps({"script": "a"})
    where = out / ".part" / ".run" if window == "before the record moves" else out / ".run.moving"
    where.mkdir(parents=True)
    (where / "run.json").write_text(run_json)
    (where / ".run.moving").touch()
    with pytest.raises(DataError, match="half published by another job"):
        publish.refuse_half_published(out, out / ".part", {"script": "b"})
    publish.refuse_half_published(out, out / ".part", {"script": "a"})


def test_a_lost_rest_is_made_again_with_overwrite(tmp_path, monkeypatch):
    """Two outputs, stopped between their renames, and what was to be renamed is deleted: the advice works."""
    here = chain(tmp_path)
    run("prune", *prune_arguments(here))
    before = {name: files(here / name) for name in ("pa", "pb")}
    real = publish.move

    def stop(part, final):
        real(part, final)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish, "move", stop)
        run("prune", *prune_arguments(here, "--overwrite"))
    shutil.rmtree(here / "pb.part")
    shutil.rmtree(here / "pb")
    line = refusal("prune", *prune_arguments(here))
    assert line.endswith("delete those, or start afresh with --overwrite") and not (here / "pb.part").exists()
    run("prune", *prune_arguments(here, "--overwrite"))
    assert {name: files(here / name) for name in ("pa", "pb")} == before
    assert not [path for path in here.iterdir() if ".part" in path.name]


def test_a_link_in_the_way_is_deleted_and_what_it_leads_to_stays(tmp_path):
    write(tmp_path / "model", state())
    (tmp_path / "out.part").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    (tmp_path / "out.part" / "link").symlink_to(tmp_path / "elsewhere")
    run("convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--overwrite")
    assert (tmp_path / "elsewhere" / "mine.txt").is_file() and not (tmp_path / "out" / "link").exists()


def test_bad_data_that_another_process_met_is_not_resumed(tmp_path, monkeypatch):
    """torchrun: the main process, stopped by the other's end, leaves its shards; with the model fixed, nothing of
    them counts, and no other job is said to have left them."""
    good = state()
    bad = good | {"model.norm.weight": torch.full((7,), float("nan")).half()}
    model, out = write(tmp_path / "model", bad), tmp_path / "out"
    command = ["convert", "--model_path", model, "--save_path", out, "--max_shard_size", 200]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "wait_for_everyone", lambda _: None)
        patch.setattr(job, "group", lambda: processes.Group(0, 2))
        patch.setattr(job.Running, "_wait_for_others", stop)
        with pytest.raises(KeyboardInterrupt):
            run(*command)
        patch.setattr(job, "group", lambda: processes.Group(1, 2))
        assert refusal(*command).startswith("tensor 'model.norm.weight' in ")
    assert list((tmp_path / "out.part").glob("*.safetensors"))
    shutil.rmtree(model)
    write(model, good)
    run(*command)
    assert load(out)["model.norm.weight"].equal(good["model.norm.weight"])


def test_an_empty_rank_is_none(monkeypatch):
    """As a job script leaves it that sets it from a variable of a scheduler that is not there."""
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert processes.group() == processes.Group(0, 1)
    check_one_process("start one")


def test_notes_are_printed_by_one_process(tmp_path, monkeypatch, capsys):
    write(tmp_path / "base", state())
    write(tmp_path / "tuned", {f"module.{name}": tensor for name, tensor in state(1).items()})
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "v")
    assert "note: " in capsys.readouterr().out
    write(tmp_path / "named", {f"module.{name}": tensor for name, tensor in state().items()})
    again = ["--finetuned_model_path", tmp_path / "tuned", "--base_model_path", tmp_path / "base"]
    vector = ["--task_vector_paths", tmp_path / "v", "--base_model_path", tmp_path / "named"]
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        run("extract", *again, "--save_path", tmp_path / "w", "--dry_run")
        run("prune", *vector, "--save_directories", tmp_path / "p", "--dry_run")
        assert capsys.readouterr().out.count("note: ") == 2 * count


def test_another_process_that_stops_leaves_the_shards(tmp_path, monkeypatch):
    """torchrun: out of memory there is no bad data here, so what is complete stays for the next attempt."""
    write(tmp_path / "model", state())
    command = ["convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--max_shard_size", 300]
    stopped_before_publishing(monkeypatch, *command)
    shards = sorted((tmp_path / "out.part").glob("*.safetensors"))
    assert len(shards) > 1

    def gone(_):
        raise RuntimeError("connection closed by peer")

    class State:
        def __init__(self, cpu):
            pass

        wait_for_everyone = gone

    import accelerate

    with monkeypatch.context() as patch:
        patch.setattr(accelerate, "PartialState", State)
        patch.setattr(job, "group", lambda: processes.Group(0, 2))
        assert refusal(*command).startswith("another process of this job has stopped; its own line says why")
    assert sorted((tmp_path / "out.part").glob("*.safetensors")) == shards


# --- refused before the first byte ----------------------------------------------------------------


def test_a_broken_config_beside_the_weights(tmp_path, monkeypatch):
    """Copied at the end, so read at the beginning."""
    model = write(tmp_path / "model", state())
    (model / "tokenizer_config.json").write_text('{"a": 1,}')
    monkeypatch.setattr(convert_dtype, "begin", lambda *_: pytest.fail("begun"))
    line = refusal("convert", "--model_path", model, "--save_path", tmp_path / "out")
    assert line.startswith(f"{model}/tokenizer_config.json: ")


def test_kinds_are_compared_under_names_that_agree(tmp_path):
    """A floating-point tensor behind a prefix that is an integer in the other model."""
    write(tmp_path / "base", state() | {"model.scale": torch.ones(4).half()})
    other = {f"module.{name}": tensor for name, tensor in state(1).items()}
    write(tmp_path / "other", other | {"module.model.scale": torch.ones(4, dtype=torch.int32)})
    paths = ["--finetuned_model_path", tmp_path / "other", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v")
    assert line.startswith("tensor 'model.scale' is I32 in ")


def test_a_path_that_is_no_utf8(tmp_path):
    """Reports name it, and JSON is UTF-8."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    line = refusal("convert", "--model_path", path, "--save_path", "x")
    assert line.endswith(": not UTF-8, or a locale without it; rename it, or set LC_ALL=C.UTF-8") and line.isascii()


@pytest.mark.slow
def test_dtypes_that_are_no_wider_are_not_advised(tmp_path):
    write(tmp_path / "base", {"a": torch.full((4,), -3e38)})
    write(tmp_path / "tuned", {"a": torch.full((4,), 3e38)})
    paths = ["--finetuned_model_path", tmp_path / "tuned", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v", "--dtype", "float32")
    assert line.endswith("is beyond the largest float32; is one of them damaged?")
    line = refusal("extract", *paths, "--save_path", tmp_path / "v", "--dtype", "bfloat16")
    assert line.endswith("is beyond the largest bfloat16; extract with --dtype float32")


# --- adapters -------------------------------------------------------------------------------------


def lora(folder: Path, tensors: dict, **settings) -> Path:
    """An adapter of rank 1 for q_proj of checkpoints.SHAPES, of these tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


A_AND_B = {
    f"base_model.model.{Q.removesuffix('.weight')}.lora_{x}.weight": t
    for x, t in (("A", torch.ones(1, 7)), ("B", torch.ones(7, 1)))
}
HEAD = "base_model.model.lm_head"


def refused_adapter(tmp_path, tensors: dict, **settings) -> str:
    write(tmp_path / "base", state())
    paths = [
        "--finetuned_model_path",
        lora(tmp_path / "lora", tensors, **settings),
        "--base_model_path",
        tmp_path / "base",
    ]
    return refusal("extract", *paths, "--save_path", tmp_path / "v")


def test_two_tensors_for_one(tmp_path):
    """modules_to_save and the layer as it was: the untrained one would have won by its name."""
    names = f"{HEAD}.modules_to_save.default.weight", f"{HEAD}.original_module.weight"
    line = refused_adapter(tmp_path, A_AND_B | {name: torch.ones(11, 7) for name in names})
    assert "replace the same tensor; save the adapter with peft's save_pretrained" in line


@pytest.mark.parametrize("alpha", [10**400, float("nan"), float("inf")])
def test_an_alpha_that_is_no_finite_number(tmp_path, alpha):
    assert "not a finite number" in refused_adapter(tmp_path, A_AND_B, lora_alpha=alpha)


@pytest.mark.slow
def test_a_constant_in_an_adapter_is_not_the_bases(tmp_path):
    """GPT-2's causal mask, which old versions save, in another dtype: the vector keeps the base's bits."""
    mask, name = torch.ones(1, 1, 4, 4).tril(), "transformer.h.0.attn.bias"
    config = {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 4, "vocab_size": 5}
    norm = {"transformer.ln_f.weight": torch.ones(4)}
    write(tmp_path / "base", norm | {name: mask}, config)
    prefix = "base_model.model."
    own = {prefix + "transformer.ln_f.weight": torch.full((4,), 3.0), prefix + name: mask.half()}
    extract(lora(tmp_path / "lora", own), tmp_path / "base", tmp_path / "v")
    vector = load(tmp_path / "v")
    assert torch.equal(vector[name], mask) and vector[name].dtype == mask.dtype
    assert torch.equal(vector["transformer.ln_f.weight"], torch.full((4,), 2.0).half())
    prune([tmp_path / "v"], [tmp_path / "p"], "--n", 1, "--m", 4)


@pytest.mark.parametrize("pattern", ["base_model.model.lm_head.*", "*lora_A*", "head"])
def test_an_adapter_is_skipped_by_the_bases_names(tmp_path, pattern):
    """Its own would leave out nothing."""
    write(tmp_path / "base", state())
    adapter = lora(tmp_path / "lora", A_AND_B | {f"{HEAD}.weight": torch.ones(11, 7)})
    paths = ["--finetuned_model_path", adapter, "--base_model_path", tmp_path / "base", "--save_path", tmp_path / "v"]
    assert refusal("extract", *paths, "--skip", "lm_head.*", pattern) == (
        f"--skip {pattern!r}: no tensor of {tmp_path}/base has such a name, and what {adapter} changes is left out by "
        "the base's names; correct it"
    )


@pytest.mark.parametrize("a, b", [((1, 7), ()), ((), (7, 1)), ((1, 7), (7,)), ((7,), (7, 1))])
def test_factors_of_too_few_dimensions(tmp_path, a, b):
    stem = f"base_model.model.{Q.removesuffix('.weight')}.lora_"
    line = refused_adapter(tmp_path, {f"{stem}A.weight": torch.ones(a), f"{stem}B.weight": torch.ones(b)})
    assert "has rank" in line or line.endswith(" do not fit it; is it an adapter of this base?")


def test_the_bases_code_is_not_the_adapters(tmp_path, capsys):
    """An adapter has no config.json: the auto_map of which a note speaks is the base's."""
    config = {"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}
    write(tmp_path / "base", state(), config)
    extract(lora(tmp_path / "lora", A_AND_B), tmp_path / "base", tmp_path / "v")
    said = capsys.readouterr().out
    assert f"{tmp_path}/base brings code of its own" in said and f"{tmp_path}/lora brings" not in said


def test_a_bin_model_beside_an_adapter_config_is_a_model(tmp_path):
    lora(tmp_path / "lora", A_AND_B)
    assert is_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "pytorch_model.bin").touch()
    assert not is_adapter(tmp_path / "lora")


# --- what goes along, what is said ----------------------------------------------------------------


def test_a_model_without_a_tokenizer_gets_the_bases(tmp_path):
    """save_pretrained writes a generation config and no tokenizer; both are in the vector."""
    for name, seed in (("base", 0), ("tuned", 1)):
        write(tmp_path / name, state(seed))
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"of": name}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "v")
    assert (tmp_path / "v" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "v" / "generation_config.json").read_text()) == {"of": "tuned"}


@pytest.mark.parametrize("blank", ["\u3000", "\u00a0"])
def test_blanks_in_a_path_are_no_damage(tmp_path, blank):
    """An ideographic space, as in many folders' names."""
    folder = tmp_path / f"my{blank}models"
    folder.mkdir()
    chain(folder)
    prune([folder / "va"], [folder / "pa"], "--n", 1, "--m", 4)


def test_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    assert is_hub_id("models/m.gguf")
    Path("models/m.gguf").touch()
    assert not is_hub_id("models/m.gguf")


def test_a_full_disk_is_where_the_copy_goes():
    """shutil.copyfile names both files, the source first."""
    error = OSError(errno.ENOSPC, "No space left on device", "model/tokenizer.json", None, "out.part/tokenizer.json")
    assert _one_line(error).startswith("the disk is full while writing out.part/tokenizer.json; ")


def test_a_full_disk_is_not_what_the_hub_answered(tmp_path, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        hub.download("org/name")


def test_a_network_that_fails_is_said(monkeypatch):
    import httpx2
    import huggingface_hub

    def gone(*_, **__):
        raise httpx2.ReadError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(DataError, match="the Hub cannot be reached"):
        hub.download("org/name")


def test_names_are_printed_so_that_they_stay_in_their_line():
    assert left_over(["a\nb", "\x1b[31mred"], [])[0].isprintable()


def test_many_files_may_be_open():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        _allow_many_files()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard or (hard == resource.RLIM_INFINITY and soft >= 10240)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_bin_base_is_verified_too(tmp_path, capsys):
    base = state()
    write(tmp_path / "base", base, suffix=".bin")
    write(tmp_path / "a", state(1, near=base))
    extract(tmp_path / "a", tmp_path / "base", tmp_path / "v")
    capsys.readouterr()
    run("prune", "--verify", tmp_path / "v", tmp_path / "base")
    assert f"{tmp_path}/base: {len(base)} tensors" in capsys.readouterr().out
