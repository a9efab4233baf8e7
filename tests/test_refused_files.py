"""Files from people one does not know: each is refused in one line that says what was found and what to do."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import load, refusal, run, state, write
from safetensors.torch import save_file

from common.shards import headers
from common.shards.headers import DTYPE_BYTES

NOT_READ = (
    f"is none of those read here ({', '.join(DTYPE_BYTES)}); take a version of the model in float16, bfloat16 or "
    "float32"
)
AGAIN = "download it again"
CUT = "it is truncated or damaged, download it again"
SAFE = "use a safetensors version of this model"
SOURCE = "get the checkpoint from a source you trust"
BAD_JSON = "download or write the file again"


def entry(dtype="F16", shape=(1,), begin=0, end=2) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors_bytes(header, data: bytes = b"\0\0") -> bytes:
    """A safetensors file of any header: a dict, or raw bytes in the place of JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def expect_refused(model: Path, line: str) -> None:
    """convert refuses the model with exactly this line, and leaves nothing behind."""
    before = sorted(model.parent.iterdir())
    got = refusal("convert", "--model_path", model, "--save_path", model.parent / "out")
    assert got == line.replace("{m}", str(model))
    assert sorted(model.parent.iterdir()) == before


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "model", state())


# --- headers --------------------------------------------------------------------------------------

FILE = "{m}/model.safetensors"
HEADERS = {
    "empty": (b"", f"0 bytes, too few for its header; it is truncated or not a safetensors file, {AGAIN}"),
    "2**63 bytes": (
        (2**63).to_bytes(8, "little") + b"{}" * 50,
        f"108 bytes, too few for its header; it is truncated or not a safetensors file, {AGAIN}",
    ),
    "no JSON": (safetensors_bytes(b"hello"), f"not valid JSON (Expecting value: line 1 column 1 (char 0)); {BAD_JSON}"),
    "no UTF-8": (
        safetensors_bytes(b'{"\xff":1}'),
        f"not valid JSON ('utf-8' codec can't decode byte 0xff in position 2: invalid start byte); {BAD_JSON}",
    ),
    "nested": (safetensors_bytes(b'{"a":' * 50_000), f"not valid JSON (nested too deeply); {BAD_JSON}"),
    "no object": (safetensors_bytes([]), "the header is not a JSON object; download the file again"),
    "twice": (safetensors_bytes(b'{"a":1,"a":2}'), f"the name 'a' occurs twice; {BAD_JSON}"),
    "twice inside": (safetensors_bytes(b'{"a":{"dtype":1,"dtype":2}}'), f"the name 'dtype' occurs twice; {BAD_JSON}"),
    "half a surrogate": (
        safetensors_bytes(b'{"\\ud800":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'),
        "not valid JSON ('utf-8' codec can't encode character '\\ud800' in position 2: surrogates not allowed); "
        f"{BAD_JSON}",
    ),
    "metadata": (
        safetensors_bytes({"__metadata__": 3, "a": entry()}),
        "__metadata__ in the header is not a JSON object; download the file again",
    ),
    "rest": (safetensors_bytes({"a": entry()}, bytes(4)), f"73 bytes, but its header describes 71; {CUT}"),
}


@pytest.mark.parametrize("content, line", HEADERS.values(), ids=HEADERS)
def test_header(model, content, line):
    (model / "model.safetensors").write_bytes(content)
    expect_refused(model, f"{FILE}: {line}")


TENSORS = {
    "no fields": (3, "the header needs dtype, shape and data_offsets; download the file again"),
    "unknown dtype": (entry("F4"), f"its dtype 'F4' {NOT_READ}"),
    "dtype is a list": (entry(["F16"]), f"its dtype ['F16'] {NOT_READ}"),
    "negative": (entry(shape=[-1]), "[-1] is not a shape; download the file again"),
    "boolean": (entry(shape=[True]), "[True] is not a shape; download the file again"),
    "fraction": (entry(shape=[1.0]), "[1.0] is not a shape; download the file again"),
    "2**63": (entry(shape=[2**63]), "[9223372036854775808] is not a shape; download the file again"),
    "17 dimensions": (entry(shape=[1] * 17), f"{[1] * 17} is not a shape; download the file again"),
    "overflowing": (
        entry(shape=[2**40, 2**40]),
        "F16 [1099511627776, 1099511627776] does not fill its 2 bytes; download the file again",
    ),
    "wrapping to 2": (
        entry(shape=[2**62, 4, 3]),
        "F16 [4611686018427387904, 4, 3] does not fill its 2 bytes; download the file again",
    ),
    "too small": (entry(shape=[2]), "F16 [2] does not fill its 2 bytes; download the file again"),
    "one offset": (entry() | {"data_offsets": [0]}, "[0] are not data_offsets; download the file again"),
    "backwards": (entry(begin=2, end=0), f"data_offsets [2, 0] lie outside the file's 2 bytes of data; {CUT}"),
    "beyond": (entry(shape=[4], end=8), f"data_offsets [0, 8] lie outside the file's 2 bytes of data; {CUT}"),
}


@pytest.mark.parametrize("value, line", TENSORS.values(), ids=TENSORS)
def test_header_entry(model, value, line):
    (model / "model.safetensors").write_bytes(safetensors_bytes({"a": value}))
    expect_refused(model, f"tensor 'a' in {FILE}: {line}")


@pytest.mark.parametrize(
    "second, line",
    [
        (entry(shape=[2], begin=1, end=5), "begins at byte 1 and overlaps the one before it (expected 2)"),
        (entry(begin=4, end=6), "begins at byte 4 and leaves a hole before it (expected 2)"),
    ],
)
def test_offsets_that_do_not_follow(model, second, line):
    header = {"a": entry(), "b": second}
    (model / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(6)))
    expect_refused(model, f"tensor 'b' in {FILE}: {line}; download the file again")


@pytest.mark.parametrize("dtype, size", [("F8_E4M3", 1), ("F64", 8)])
def test_dtypes_without_exact_arithmetic(model, dtype, size):
    content = safetensors_bytes({"a": entry(dtype, end=size)}, bytes(size))
    (model / "model.safetensors").write_bytes(content)
    expect_refused(
        model,
        f"tensor 'a' is {dtype} in {{m}}; needed is float16, bfloat16 or float32: "
        "take an unquantised version of the model",
    )


def test_a_header_longer_than_any(model):
    """Refused before it is read: the file is sparse, and only its first 8 bytes are looked at."""
    length = headers.MAX_HEADER_BYTES + 1
    with open(model / "model.safetensors", "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(2 * length)
    expect_refused(
        model, f"{FILE}: a header of {length} bytes, at most {length - 1} are accepted; get it from a source you trust"
    )


@pytest.mark.parametrize("keep", [4, 300, 1000])
def test_truncated(model, keep):
    """Cut anywhere: in the length, in the header, in the data."""
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal("convert", "--model_path", model, "--save_path", model.parent / "out")
    assert str(path) in line and line.endswith(AGAIN) and "truncated" in line


def test_odd_but_sound(tmp_path):
    """Scalars, empty tensors of any shape, and names with quotes, slashes and line ends are carried through."""
    header = {"": entry("F32", [], 0, 4), "../x\n'\"": entry(begin=4, end=6), "empty": entry("F16", [0, 2**62], 6, 6)}
    model = write(tmp_path / "model", state())
    (model / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(6)))
    run("convert", "--model_path", model, "--save_path", tmp_path / "out", "--max_shard_size", 2)
    assert {t.name: t.shape for t in headers.read_headers(tmp_path / "out")} == {
        "": (),
        "../x\n'\"": (1,),
        "empty": (0, 2**62),
    }
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


# --- indexes and configs --------------------------------------------------------------------------

INDEX = "{m}/model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLAIN = f"which is not a plain file name ending in .safetensors; {SOURCE}"
INDEXES = {
    "up and away": (
        {"lm_head.weight": "../../etc/x.safetensors"},
        f"{INDEX}: tensor 'lm_head.weight' is mapped to '../../etc/x.safetensors', {PLAIN}",
    ),
    "absolute": (
        {"lm_head.weight": "/etc/passwd"},
        f"{INDEX}: tensor 'lm_head.weight' is mapped to '/etc/passwd', {PLAIN}",
    ),
    "backslash": (
        {"lm_head.weight": "a\\b.safetensors"},
        f"{INDEX}: tensor 'lm_head.weight' is mapped to 'a\\\\b.safetensors', {PLAIN}",
    ),
    "hidden": (
        {"lm_head.weight": ".x.safetensors"},
        f"{INDEX}: tensor 'lm_head.weight' is mapped to '.x.safetensors', {PLAIN}",
    ),
    "line end": (
        {"lm_head.weight": "a\nb.safetensors"},
        f"{INDEX}: tensor 'lm_head.weight' is mapped to 'a\\nb.safetensors', {PLAIN}",
    ),
    "a number": ({"lm_head.weight": 3}, f"{INDEX}: tensor 'lm_head.weight' is mapped to 3, {PLAIN}"),
    "no such file": (
        {"lm_head.weight": "x.safetensors"},
        "{m}/x.safetensors: missing, though model.safetensors.index.json names it (2 of 3 files are there); download "
        "the rest",
    ),
    "another file": (
        {"lm_head.weight": TWO},
        f"tensor 'lm_head.weight' is not in {{m}}/{TWO}, where "
        "model.safetensors.index.json says it is; download the checkpoint again",
    ),
    "too many": (
        {"x": ONE},
        f"tensor 'x' is not in {{m}}/{ONE}, where model.safetensors.index.json says it is; "
        "download the checkpoint again",
    ),
    "too few": (
        {"lm_head.weight": None},
        f"tensor 'lm_head.weight' of {{m}}/{ONE} is not in model.safetensors.index.json; download the checkpoint again",
    ),
}


@pytest.mark.parametrize("change, line", INDEXES.values(), ids=INDEXES)
def test_index(tmp_path, change, line):
    model = write(tmp_path / "model", state(), files=2)
    path = model / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"] | change
    path.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v is not None}}))
    expect_refused(model, line)


@pytest.mark.parametrize(
    "text, line",
    [
        ("{}", f"{INDEX}: needs a 'weight_map' of tensor names to files; {AGAIN}"),
        ('{"weight_map": []}', f"{INDEX}: needs a 'weight_map' of tensor names to files; {AGAIN}"),
        ('{"weight_map": {"a": "x", "a": "y"}}', f"{INDEX}: the name 'a' occurs twice; {BAD_JSON}"),
        ("[]", f"{INDEX}: a JSON object is needed, found list; download or write the file again"),
    ],
)
def test_index_text(tmp_path, text, line):
    model = write(tmp_path / "model", state(), files=2)
    (model / "model.safetensors.index.json").write_text(text)
    expect_refused(model, line)


def test_a_tensor_in_two_files(tmp_path):
    model = write(tmp_path / "model", state(), files=2)
    save_file(load(model), model / TWO)
    expect_refused(model, f"tensor 'lm_head.weight' is in both {ONE} and {TWO} of {{m}}; download the checkpoint again")


def test_single_file_and_index(tmp_path):
    model = write(tmp_path / "model", state(), files=2)
    save_file(state(), model / "model.safetensors")
    expect_refused(
        model,
        "{m}: holds both model.safetensors and model.safetensors.index.json, and tools disagree on "
        "which counts; delete the one that is stale",
    )


def test_single_file_and_an_index_of_it(tmp_path):
    """mlx_lm writes both, and they agree; an index that says something else of the file is refused."""
    model = write(tmp_path / "model", state())
    index = {"metadata": {}, "weight_map": dict.fromkeys(state(), "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    run("convert", "--model_path", model, "--save_path", tmp_path / "out", "--dtype", "float16")
    assert load(tmp_path / "out").keys() == state().keys()
    index["weight_map"].pop("model.norm.weight")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal("convert", "--model_path", model, "--save_path", tmp_path / "out2")
    assert line == (
        f"tensor 'model.norm.weight' of {model / 'model.safetensors'} is not in model.safetensors.index.json; "
        "download the checkpoint again"
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 14483498224\n"
POINTERS = [
    "model.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.model",
    "tokenizer.json",
]


@pytest.mark.parametrize("name", POINTERS)
def test_git_lfs_pointers(tmp_path, name):
    """`git clone` without LFS leaves three lines of text."""
    suffix = ".bin" if name.endswith(".bin") else ".safetensors"
    model = write(tmp_path / "model", state(), files=2 if "-" in name or "index" in name else 1, suffix=suffix)
    (model / name).write_bytes(POINTER)
    expect_refused(model, f"{{m}}/{name}: a Git LFS pointer, not the file; run `git lfs pull` in {{m}}")


def test_config_as_transformers_reads_it(tmp_path):
    """A byte order mark, a name twice: accepted of config.json, the last one counts."""
    model = write(tmp_path / "model", state())
    text = '{"model_type": "llama", "model_type": "mistral", "tie_word_embeddings": false}'
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (model / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1, "a": 2}')
    run("convert", "--model_path", model, "--save_path", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"


def test_no_weights_no_config(model):
    (model / "config.json").rename(model.parent / "config.json")
    expect_refused(model, "{m}: no config.json in it; copy it from where the model came from")
    (model / "model.safetensors").unlink()
    expect_refused(model, "{m}: an empty directory; point at the one that holds the weights")
    (model / "tokenizer.json").write_text("{}")
    expect_refused(
        model,
        "{m}: no model.safetensors, no model.safetensors.index.json, no pytorch_model.bin in it; "
        "point at the directory that holds the weights",
    )
    shutil.rmtree(model)
    expect_refused(model, "{m}: no such directory; check the path, or give a Hugging Face Hub id such as org/name")
    model.write_text("")
    expect_refused(model, f"{{m}}: a file; give the directory that holds it, {model.parent}")


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "{",
            f"not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {BAD_JSON}",
        ),
        ("3", "a JSON object is needed, found int; download or write the file again"),
        ('{"a":' * 100_000, f"not valid JSON (nested too deeply); {BAD_JSON}"),
        ('{"x_config":' * 600 + "{}" + "}" * 600, f"nested more than 50 deep; {SOURCE}"),
        (
            '{"x": "\\ud800"}',
            "not valid JSON ('utf-8' codec can't encode character '\\ud800' in position 7: "
            f"surrogates not allowed); {BAD_JSON}",
        ),
    ],
)
def test_config(model, text, line):
    (model / "config.json").write_text(text)
    expect_refused(model, f"{{m}}/config.json: {line}")


def test_quantised(model):
    (model / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    expect_refused(
        model,
        "{m}: config.json has a quantization_config, but no weight is quantised; if it is left over, remove it from "
        "config.json, or else take an unquantised version of the model",
    )
    save_file(state() | {"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, model / "model.safetensors")
    expect_refused(
        model,
        "tensor 'a.qweight' is I32 in {m}: its weights are quantised; take an unquantised version of the model",
    )


@pytest.mark.parametrize("value", ["null", "{}"])
def test_not_quantised(model, value):
    """Both say that there is none; outputs do not repeat them, since transformers stumbles over {}."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config)[:-1] + f', "quantization_config": {value}}}')
    run("convert", "--model_path", model, "--save_path", model.parent / "out")
    written = json.loads((model.parent / "out" / "config.json").read_text())
    assert written.keys() == config.keys() - {"torch_dtype"} | {"dtype"}


# --- pickles --------------------------------------------------------------------------------------

BIN = "{m}/pytorch_model.bin"
OLD = f"damaged, or in PyTorch's old format from before 1.6; download it again, or {SAFE}"


class Evil:
    """Unpickled, it would leave a directory behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(value, **options) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def rezipped(content: bytes, method=zipfile.ZIP_STORED, **replaced: bytes) -> bytes:
    """The same zip in another compression, or with other content for records of some base name."""
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(out, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, replaced.get(name.rsplit("/")[-1], source.read(name)))
    return out.getvalue()


GOOD = saved({"a": torch.ones(200)})
BINS = {
    "empty": (b"", f"{BIN}: {OLD}"),
    "old format": (saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False), f"{BIN}: {OLD}"),
    "cut": (GOOD[:700], f"{BIN}: not a valid zip file (File is not a zip file); it is cut short or damaged, {AGAIN}"),
    "compressed": (rezipped(GOOD, zipfile.ZIP_DEFLATED), f"{BIN}: its zip is compressed; {SAFE}"),
    "big-endian": (rezipped(GOOD, byteorder=b"big"), f"{BIN}: not in little-endian byte order; {SAFE}"),
    "short record": (
        rezipped(GOOD, **{"0": bytes(100)}),
        f"tensor 'a' in {BIN}: the file does not hold its 800 bytes; {AGAIN}",
    ),
    "a list": (saved([torch.ones(2)]), f"{BIN}: holds a list, needed is a state dict of tensors; {SAFE}"),
    "nested": (
        saved({"model": {}}),
        f"{BIN}: a training checkpoint, whose tensors are one level deeper, under 'model'; save what is there alone, "
        f"or {SAFE}",
    ),
    "a dict among tensors": (
        saved({"a": torch.ones(2), "b": {}}),
        f"tensor 'b' in {BIN}: found dict, needed is a plain tensor; {SAFE}",
    ),
    "numbered": (saved({1: torch.ones(2)}), f"{BIN}: 1 is not a tensor's name; {SAFE}"),
    "no Unicode": (saved({"\ud800": torch.ones(2)}), f"{BIN}: '\\ud800' is not a tensor's name; {SAFE}"),
    "complex": (
        saved({"a": torch.ones(2, dtype=torch.complex64)}),
        f"tensor 'a' in {BIN}: found torch.complex64, torch.strided, needed is a plain tensor; {SAFE}",
    ),
    "sparse": (
        saved({"a": torch.eye(2).to_sparse()}),
        f"tensor 'a' in {BIN}: found torch.float32, torch.sparse_coo, needed is a plain tensor; {SAFE}",
    ),
    "transposed": (
        saved({"a": torch.ones(3, 4).t()}),
        f"tensor 'a' in {BIN}: a view with strides (1, 4), needed is row-major; "
        "load the model and save it as safetensors",
    ),
    "negated": (
        saved({"a": torch.ones(3)._neg_view()}),
        f"tensor 'a' in {BIN}: a view with strides (1,), needed is row-major; "
        "load the model and save it as safetensors",
    ),
    "nowhere": (
        saved({"a": torch.ones(2, device="meta")}),
        f"tensor 'a' in {BIN}: the file does not hold its 8 bytes; {AGAIN}",
    ),
}


@pytest.mark.parametrize("content, line", BINS.values(), ids=BINS)
def test_bin(model, content, line):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    expect_refused(model, line)


def test_code_in_a_pickle_is_never_run(model):
    """A zip whose pickle calls something, the old format, and a bare pickle: refused, and nothing happened."""
    (model / "model.safetensors").unlink()
    witness = model.parent / "ran"
    state_dict = {"a": torch.ones(2), "b": Evil(witness)}
    for content in (
        saved(state_dict),
        saved(state_dict, _use_new_zipfile_serialization=False),
        pickle.dumps(Evil(witness)),
    ):
        (model / "pytorch_model.bin").write_bytes(content)
        line = refusal("convert", "--model_path", model, "--save_path", model.parent / "out")
        assert str(model / "pytorch_model.bin") in line and line.endswith(SAFE)
        assert not witness.exists()
    (model / "pytorch_model.bin").write_bytes(saved(state_dict))
    expect_refused(
        model,
        f"{BIN}: not readable as plain tensors (it asks to run posix.mkdir, and nothing in a "
        f"checkpoint is run); {SAFE}",
    )


def test_views_in_a_bin_are_read_as_torch_reads_them(tmp_path):
    """Slices of one storage, shared tensors, parameters, scalars and empty tensors."""
    whole = torch.arange(10.0)
    tensors = {
        "a": whole[3:5],
        "b": whole.view(2, 5)[1],
        "c": whole,
        "d": torch.tensor(2.0),
        "e": torch.ones(0, 3),
        "f": torch.nn.Parameter(torch.ones(2)),
    }
    write(tmp_path / "model", tensors, suffix=".bin")
    run("convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--dtype", "float32")
    out = load(tmp_path / "out")
    assert all(torch.equal(out[name], tensors[name]) for name in tensors)
