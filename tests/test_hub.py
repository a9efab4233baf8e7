"""Hub ids against a stand-in for the Hub on 127.0.0.1 that counts the bytes it sends."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from checkpoints import extract, load, write
from conftest import ROOT, save_model
from recipes_and_models import set_the_table
from safetensors.torch import save_file

SHA = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "tie_word_embeddings": False}
SIDE = 700  # two tensors of about a megabyte each


class Standing(BaseHTTPRequestHandler):
    """model info, HEAD and GET (with ranges) of files under server.root/org/name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, code: int, body: bytes, headers: dict, send: bool = True) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if send:
            self.server.sent += len(body)
            self.wfile.write(body)

    def _file(self, send: bool) -> None:
        org, name, _, _, file = self.path.strip("/").split("?")[0].split("/", 4)
        path = self.server.root / org / name / file
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}
            return self._answer(404, b"", headers, send)
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        span = self.headers.get("Range") or self.headers.get("range")
        if not span:
            return self._answer(200, body, headers, send)
        first, last = (int(n) if n else None for n in span.removeprefix("bytes=").split("-"))
        part = body[first : None if last is None else last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        return self._answer(206, part, headers, send)

    def do_HEAD(self):
        self._file(False)

    def do_GET(self):
        if not self.path.startswith("/api/models/"):
            return self._file(True)
        org, name = self.path.split("?")[0].split("/")[3:5]
        root = self.server.root / org / name
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not files:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in self.path:
            listed = [
                {"type": "file", "path": str(f.relative_to(root)), "size": f.stat().st_size, "oid": SHA} for f in files
            ]
        else:
            listed = {
                "id": f"{org}/{name}",
                "sha": SHA,
                "siblings": [{"rfilename": str(f.relative_to(root))} for f in files],
            }
        return self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Standing)
    server.root, server.sent = tmp_path / "hub", 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tensors(rows: int = SIDE, extra: dict | None = None) -> dict:
    made = {"model.embed_tokens.weight": torch.ones(rows, SIDE), "model.norm.weight": torch.ones(SIDE, SIDE)}
    return {name: tensor.half() for name, tensor in (made | (extra or {})).items()}


def call(hub, tmp_path: Path, script: str, *arguments, free: int | None = None) -> subprocess.CompletedProcess:
    """Run a script against the stand-in; free: bytes that every disk has left."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    little = (
        "import shutil, runpy, sys; del sys.argv[0]; "
        f"shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, {free}); "
    )
    as_script = (
        [ROOT / script]
        if free is None
        else ["-c", f"{little}runpy.run_path(sys.argv[0], run_name='__main__')", ROOT / script]
    )
    command = [sys.executable, *as_script, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2])
def test_a_dry_run_downloads_no_weights(hub, tmp_path, files):
    """Sizes and counts as of the model itself, for a few kilobytes; then the job downloads and does it."""
    model = write(hub.root / "org" / "base", tensors(), CONFIG, files)
    arguments = ["--model_path", "org/base", "--save_path", "out", "--dtype", "float32"]
    done = call(hub, tmp_path, "convert_dtype.py", *arguments, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "0.002 GB  org/base (2 tensors, to be downloaded)" in done.stdout
    assert hub.sent < 300_000, "a header costs 100 kB at most"
    done = call(hub, tmp_path, "convert_dtype.py", *arguments)
    assert done.returncode == 0, done.stderr
    out, whole = load(tmp_path / "out"), load(model)
    assert out.keys() == whole.keys() and all(torch.equal(out[name].half(), whole[name]) for name in whole)
    assert hub.sent > 1_900_000
    before = hub.sent
    done = call(hub, tmp_path, "convert_dtype.py", *arguments, "--dry_run")
    assert "(2 tensors)" in done.stdout and hub.sent - before < 50_000, "now it is here"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_is_in_the_cache_needs_no_network(hub, tmp_path, suffix):
    """Downloaded once, then the Hub is out of reach and nobody says HF_HUB_OFFLINE: the cache does."""
    write(hub.root / "org" / "base", tensors(), CONFIG, suffix=suffix)
    assert call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/base", "--save_path", "one").returncode == 0
    hub.shutdown()
    hub.server_close()
    done = call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/base", "--save_path", "two")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "two").keys() == tensors().keys()


MISFITS = {
    "another vocabulary": (tensors(rows=SIDE + 2), "the vocabularies differ: extract with --vocabulary common"),
    "a value head": (
        tensors(extra={"v_head.w": torch.ones(1)}),
        "2 of 3 tensors agree; only in org/ft: v_head.w (1 tensor)",
    ),
    "another dtype": ({n: t.double() for n, t in tensors().items()}, "is F64 in org/ft; needed is float16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("finetuned, line", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_before_the_download(hub, tmp_path, finetuned, line):
    """One line, and of the weights only headers were sent."""
    write(hub.root / "org" / "base", tensors(), CONFIG)
    write(hub.root / "org" / "ft", finetuned, CONFIG)
    done = call(
        hub,
        tmp_path,
        "extract_task_vector_7b.py",
        "--finetuned_model_path",
        "org/ft",
        "--base_model_path",
        "org/base",
        "--save_path",
        "v",
    )
    assert done.returncode == 1 and line in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert hub.sent < 400_000


UNUSABLE = {
    "GGUF": (
        ["m.Q4_K_M.gguf", "README.md", ".gitattributes"],
        "holds GGUF (m.Q4_K_M.gguf), which llama.cpp reads; take the safetensors version of the model",
    ),
    "an image model": (
        ["model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"],
        "holds what diffusers reads (model_index.json), for image models; these scripts take transformers' models",
    ),
    "a config alone": (
        ["config.json", "README.md"],
        "a config.json but no weights (model.safetensors, pytorch_model.bin, or an index of several); download those "
        "too",
    ),
    "a variant": (
        ["config.json", "model.fp16.safetensors"],
        "holds model.fp16.safetensors but no model.safetensors; if that is the whole model, rename it to "
        "model.safetensors",
    ),
    "shards without an index": (
        ["config.json", "model-00001-of-00001.safetensors"],
        "1 shard(s) (model-00001-of-00001.safetensors, …) but no model.safetensors.index.json, which says what is in "
        "them; download it into this directory",
    ),
    "no config": (
        ["model.safetensors", "README.md"],
        "no config.json in it; download the weights and add the config.json of the model they come from",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("files, line", UNUSABLE.values(), ids=UNUSABLE)
def test_a_repository_that_holds_something_else(hub, tmp_path, files, line):
    """Said by what its list of files shows; nothing of it is downloaded."""
    for name in files:
        path = hub.root / "org" / "other" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name.endswith("json") else bytes(2_000_000))
    done = call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/other", "--save_path", "out")
    assert done.stderr.splitlines()[-1] == f"error: org/other: {line}"
    assert hub.sent < 100_000


BESIDE = {
    "a variant": (".safetensors", 1, ["model.fp16.safetensors"]),
    "another set of shards": (".safetensors", 2, ["model-00001-of-00001.safetensors"]),
    "a variant in safetensors alone": (".bin", 1, ["model.fp16.safetensors", "pytorch_model.fp16.bin"]),
    "an adapter": (".bin", 1, ["adapter_model.safetensors", "adapter_config.json"]),
    "an adapter of a model in shards": (".bin", 2, ["adapter_model.safetensors"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix, files, others", BESIDE.values(), ids=BESIDE)
def test_of_the_weights_only_what_is_read_is_downloaded(hub, tmp_path, suffix, files, others):
    """Whatever lies beside them: neither in their place nor with them."""
    model = write(hub.root / "org" / "base", tensors(), CONFIG, files, suffix)
    for name in others:
        (model / name).write_bytes(b"{}" if name.endswith("json") else bytes(2_000_000))
    done = call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/base", "--save_path", "out")
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "out").keys() == tensors().keys()
    assert WEIGHTS < hub.sent < WEIGHTS + 300_000


@pytest.mark.slow
def test_bin_shards_of_any_name_are_downloaded_and_resume(hub, tmp_path):
    """As the index names them; and one that a stopped download lacks is asked for again."""
    model = write(hub.root / "org" / "base", tensors(), CONFIG, files=2, suffix=".bin")
    index = model / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-0", "pytorch_model_0"))
    for path in model.glob("pytorch_model-0*"):
        path.rename(model / path.name.replace("-", "_", 1))
    for out in ("one", "two"):
        done = call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/base", "--save_path", out)
        assert done.returncode == 0, done.stderr
        assert load(tmp_path / out).keys() == tensors().keys()
        (last,) = (tmp_path / "home").rglob("pytorch_model_00002-of-00002.bin")
        last.resolve().unlink()
        last.unlink()


@pytest.mark.slow
def test_two_models_in_one_repository_are_refused_before_the_download(hub, tmp_path):
    """An index and a single file: as in a directory, but nothing of it is the user's to delete."""
    model = write(hub.root / "org" / "base", tensors(), CONFIG, files=2)
    save_file(tensors(), model / "model.safetensors")
    done = call(hub, tmp_path, "convert_dtype.py", "--model_path", "org/base", "--save_path", "out")
    assert done.stderr.splitlines()[-1] == (
        "error: org/base: holds both model.safetensors and model.safetensors.index.json, and tools disagree on which "
        "counts; download one of the two into a directory, without the other, and give that"
    )
    assert hub.sent < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_adapter(hub, tmp_path, suffix):
    """From the Hub, then from the cache."""
    write(hub.root / "org" / "base", tensors(), CONFIG)
    lora = hub.root / "org" / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    stem = "base_model.model.model.norm.lora_"
    factors = {f"{stem}A.weight": torch.ones(1, SIDE), f"{stem}B.weight": torch.ones(SIDE, 1)}
    path = lora / f"adapter_model{suffix}"
    save_file(factors, path) if suffix == ".safetensors" else torch.save(factors, path)
    flags = ["--finetuned_model_path", "org/lora", "--base_model_path", "org/base"]
    assert call(hub, tmp_path, "extract_task_vector_7b.py", *flags, "--save_path", "v").returncode == 0
    assert load(tmp_path / "v")["model.norm.weight"].eq(1).all()
    hub.shutdown()
    hub.server_close()
    done = call(hub, tmp_path, "extract_task_vector_7b.py", *flags, "--save_path", "w")
    assert done.returncode == 0, done.stderr


# --- prune and merge ------------------------------------------------------------------------------

WEIGHTS = 2 * SIDE * SIDE * 2  # bytes of one model


@pytest.fixture
def published(hub) -> Path:
    """org/base, org/ft, org/va and org/vb on the Hub: a base, a fine-tuned model, two task vectors of that base."""
    base = tensors()
    fine = [{n: t + (i + 1) * torch.eye(SIDE).half() for n, t in base.items()} for i in range(2)]
    root = hub.root / "org"
    write(root / "base", base, CONFIG)
    for model, vector, own in zip(("ft", "ft2"), ("va", "vb"), fine, strict=True):
        write(root / model, own, CONFIG)
        extract(root / model, root / "base", root / vector)
        record = root / vector / "task_vector.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model_path": "org/base"}))
    return root


PRUNE = ["--task_vector_paths", "org/va", "org/vb", "--save_directories", "pa", "pb", "--n", 1, "--m", 4]
RECIPE = """merge_method: task_arithmetic
base_model: org/base
models: [{model: org/ft, parameters: {weight: 0.5}}, {model: org/ft2, parameters: {weight: 0.5}}]
dtype: float32
out_dtype: float16
"""
MERGE = ["--recipe", "r.yml", "--save_path", "merged", "--merge_only"]
JOBS = {
    "prune": ("prune_task_vector_7b.py", PRUNE, ["pa", "pb"], 3 * WEIGHTS),
    "merge": ("merge_and_evaluate_7b.py", MERGE, ["merged"], 3 * WEIGHTS),
    "convert": ("convert_dtype.py", ["--model_path", "org/base", "--save_path", "out"], ["out"], WEIGHTS),
    "extract": (
        "extract_task_vector_7b.py",
        ["--finetuned_model_path", "org/ft", "--base_model_path", "org/base", "--save_path", "v"],
        ["v"],
        2 * WEIGHTS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments, outputs, nbytes", JOBS.values(), ids=JOBS)
def test_nothing_is_downloaded_before_everything_fits(hub, tmp_path, published, script, arguments, outputs, nbytes):
    """A dry run, an output that exists, too little room, another job's rest: headers alone are sent. Then the job
    itself."""
    (tmp_path / "r.yml").write_text(RECIPE)
    done = call(hub, tmp_path, script, *arguments, "--dry_run")
    assert done.returncode == 0 and done.stdout.count("to be downloaded") == nbytes // WEIGHTS, done.stderr
    (tmp_path / outputs[-1]).mkdir()
    (tmp_path / outputs[-1] / "mine").write_text("x")
    done = call(hub, tmp_path, script, *arguments)
    assert done.stderr == f"error: {outputs[-1]}: already there; give --overwrite to replace it, or write elsewhere\n"
    done = call(hub, tmp_path, script, *arguments, "--overwrite", free=nbytes + 1000)
    needed = nbytes + len(outputs) * (WEIGHTS + 100)
    assert f"{needed / 1e9:.2f} GB are needed there and {nbytes / 1e9:.2f} GB are free" in done.stderr, done.stderr
    assert (tmp_path / outputs[-1] / "mine").read_text() == "x"
    (tmp_path / outputs[-1]).rename(tmp_path / f"{outputs[-1]}.part")
    done = call(hub, tmp_path, script, *arguments)
    assert f"{outputs[-1]}.part: left by another job" in done.stderr, done.stderr
    shutil.rmtree(tmp_path / f"{outputs[-1]}.part")
    assert hub.sent < 1_000_000 and not any((tmp_path / name).exists() for name in outputs)

    done = call(hub, tmp_path, script, *arguments)
    assert done.returncode == 0, done.stderr
    assert nbytes < hub.sent < nbytes + 2_000_000
    assert all(set(load(tmp_path / name)) == set(tensors()) for name in outputs)


@pytest.mark.slow
def test_the_same_bytes_from_the_hub_as_from_directories(hub, tmp_path, published):
    """Pruned and merged."""
    (tmp_path / "r.yml").write_text(RECIPE)
    (tmp_path / "local.yml").write_text(RECIPE.replace("org/", f"{published}/"))
    local = [f"{published}/{a.removeprefix('org/')}" if str(a).startswith("org/") else a for a in PRUNE]
    local = [{"pa": "qa", "pb": "qb"}.get(a, a) for a in local]
    for script, arguments in (
        ("prune_task_vector_7b.py", PRUNE),
        ("prune_task_vector_7b.py", [*local, "--base_model_path", published / "base"]),
        ("merge_and_evaluate_7b.py", MERGE),
        ("merge_and_evaluate_7b.py", ["--recipe", "local.yml", "--save_path", "merged_too", "--merge_only"]),
    ):
        done = call(hub, tmp_path, script, *arguments)
        assert done.returncode == 0, done.stderr
    for one, other in (("pa", "qa"), ("pb", "qb"), ("merged", "merged_too")):
        assert (tmp_path / one / "model.safetensors").read_bytes() == (
            tmp_path / other / "model.safetensors"
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments", [JOBS[name][:2] for name in ("prune", "merge")], ids=["prune", "merge"])
def test_a_base_that_does_not_fit_is_refused_before_the_download(hub, tmp_path, published, script, arguments):
    """Its headers tell."""
    (tmp_path / "r.yml").write_text(RECIPE)
    shutil.rmtree(published / "base")
    write(published / "base", tensors(extra={"model.layers.0.w": torch.ones(3)}), CONFIG)
    done = call(hub, tmp_path, script, *arguments)
    assert done.returncode == 1 and "2 of 3 tensors agree; only in org/base: model.layers.0.w (1 tensor)" in done.stderr
    assert hub.sent < 700_000


@pytest.mark.slow
def test_room_for_a_bin_is_checked_before_its_download(hub, tmp_path):
    """It has no header to read, but a size."""
    write(hub.root / "org" / "old", tensors(), CONFIG, suffix=".bin")
    arguments = ["--model_path", "org/old", "--save_path", "out"]
    done = call(hub, tmp_path, "convert_dtype.py", *arguments, free=1_000_000)
    assert done.returncode == 1 and "0.00 GB are needed there" in done.stderr, done.stderr
    assert hub.sent < 100_000
    assert call(hub, tmp_path, "convert_dtype.py", *arguments).returncode == 0 and hub.sent > WEIGHTS


@pytest.mark.slow
def test_a_model_to_score_is_downloaded_after_every_refusal(hub, tmp_path):
    """--eval_only on a Hub id: a dry run, results that exist."""
    save_model(hub.root / "org" / "model", 0)
    (hub.root / "org" / "model" / "padding.jinja").write_text("x")  # not a file of the model
    set_the_table(tmp_path, hub.root / "org")
    (tmp_path / "model").unlink()
    weights = (hub.root / "org" / "model" / "model.safetensors").stat().st_size
    flags = ["--eval_only", "--save_path", "org/model", "--eval_recipe", "eval.yml", "--output_path", "r.json"]
    done = call(hub, tmp_path, "merge_and_evaluate_7b.py", *flags, "--dry_run")
    assert done.returncode == 0 and "(to be downloaded)" in done.stdout, done.stderr
    (tmp_path / "r.json").write_text("{}")
    done = call(hub, tmp_path, "merge_and_evaluate_7b.py", *flags)
    assert done.stderr.endswith("error: r.json: already there; give --overwrite to replace it, or write elsewhere\n")
    cached = [path for path in (tmp_path / "home").rglob("*.safetensors") if path.stat().st_size >= weights]
    assert cached == []
