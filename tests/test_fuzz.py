"""Mutated headers, indexes and .bin files: read or refused with DataError, quickly, in little memory, nothing else."""

import io
import json
import os
import random
import re
import resource
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from checkpoints import write
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save

from common.errors import DataError
from common.shards import bins, headers
from common.shards.checkpoint import config_with_dtype, open_checkpoint
from common.shards.dtypes import check_floats
from common.shards.layout import lay_out, plan_shards
from common.shards.matching import match

QUICK = 10.0  # seconds for one small file on a busy machine; it takes well under a millisecond
EXAMPLES = 500
relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

TENSORS = {
    "lm_head.weight": torch.arange(6, dtype=torch.float16).view(3, 2),
    "model.norm.weight": torch.ones(2, dtype=torch.bfloat16),
    "position_ids": torch.arange(3),
}
SOUND = save(TENSORS, metadata={"format": "pt"})
LENGTH = int.from_bytes(SOUND[:8], "little")


def attempt(read, *arguments):
    """What read returns, or None where it refuses; anything but DataError is a failure, and so is a slow answer."""
    started = time.monotonic()
    try:
        return read(*arguments)
    except DataError as error:
        assert 20 < len(str(error)) < 1500 and "\n" not in str(error).replace(str(arguments[0]), ""), error
        str(error).encode("utf-8", "backslashreplace")
        return None
    finally:
        assert time.monotonic() - started < QUICK


def expect_sound(path: Path, tensors: list) -> None:
    """What was accepted lies within its file, without overlap, and can be planned and written."""
    size, ranges = path.stat().st_size, sorted((t.offset, t.offset + t.nbytes) for t in tensors)
    assert all(0 < begin <= end <= size for begin, end in ranges)
    assert all(left[1] <= right[0] for left, right in zip(ranges, ranges[1:], strict=False))
    if tensors:
        plan_shards([(t.name, t.dtype, t.shape) for t in tensors], 100)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


# --- bytes ----------------------------------------------------------------------------------------

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, len(SOUND) - 1), st.integers(0, 255)),
        st.tuples(st.just("drop"), st.integers(0, len(SOUND) - 1), st.integers(1, 40)),
        st.tuples(st.just("add"), st.integers(0, len(SOUND)), st.binary(max_size=12)),
        st.tuples(st.just("copy"), st.integers(0, len(SOUND)), st.integers(0, len(SOUND))),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list) -> bytes:
    """Bytes set, dropped, added and doubled, one edit after the other."""
    for kind, at, what in edits:
        if kind == "set":
            content = content[:at] + bytes([what]) + content[at + 1 :]
        elif kind == "drop":
            content = content[:at] + content[at + what :]
        elif kind == "add":
            content = content[:at] + what + content[at:]
        else:
            content = content[:at] + content[at:what] + content[at:]
    return content


@pytest.mark.slow
@relaxed
@given(EDITS)
def test_mutated_bytes(path, edits):
    """Bytes of a sound file changed anywhere; the length field is made to fit in half of the cases."""
    content = edited(SOUND, edits)
    for fitted in (
        content,
        (len(content) - 8 - (len(SOUND) - 8 - LENGTH)).to_bytes(8, "little", signed=True) + content[8:],
    ):
        path.write_bytes(fitted)
        found = attempt(headers.read_file_header, path)
        if found is not None:
            expect_sound(path, found)


@pytest.mark.slow
def test_thousands_of_mutations(path):
    """10000 files, seeded: bits flipped, digits changed, pieces of the header cut out, doubled or swapped."""
    chance, accepted = random.Random(1), 0
    for _ in range(10_000):
        header, data = bytearray(SOUND[8 : 8 + LENGTH]), SOUND[8 + LENGTH :]
        for _ in range(chance.randint(1, 3)):
            at, length = chance.randrange(len(header)), chance.randint(1, 20)
            piece = header[at : at + length]
            kind = chance.randrange(5)
            if kind == 0:
                header[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                header[at : at + 1] = chance.choice([b"0", b"9", b"-", b"[", b"{", b"}", b'"', b",", b"e", b"\\"])
            elif kind == 2:
                del header[at : at + length]
            else:
                to = chance.randrange(len(header))
                header[to : to + (length if kind == 3 else 0)] = piece
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        found = attempt(headers.read_file_header, path)
        if found is not None:
            expect_sound(path, found)
            accepted += 1
    assert 100 < accepted < 5_000


@pytest.mark.slow
@relaxed
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_arbitrary_bytes(path, content, length):
    path.write_bytes(content if length is None else length.to_bytes(8, "little") + content)
    attempt(headers.read_file_header, path)


# --- structure ------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**64 - 1)
NUMBERS = [-1, 0, 1, 2, 3, 2, 4, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**200, -(2**63)]
WORDS = ["", "F16", "I64", "U8", "F4", "dtype", "a", "é", "\ud800", "\0", "\n", "lm_head.weight", "x" * 2000]


def anything(chance: random.Random, depth: int = 3):
    """A value as JSON can hold: scalars of every kind, lists and objects up to `depth`."""
    kind = chance.randrange(8 if depth else 6)
    if kind < 6:
        return [None, True, chance.choice(NUMBERS), chance.random(), float("nan"), chance.choice(WORDS)][kind]
    inner = [anything(chance, depth - 1) for _ in range(chance.randrange(4))]
    return inner if kind == 6 else {chance.choice(WORDS): value for value in inner}


def or_anything(chance: random.Random, value):
    """The value in most cases."""
    return value if chance.random() < 0.85 else anything(chance)


def any_entry(chance: random.Random):
    """A tensor as a header describes it, every field of it doubtful."""
    shape = [chance.choice(NUMBERS) for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 18]))]
    fields = {
        "dtype": or_anything(chance, chance.choice([*headers.DTYPE_BYTES])),
        "shape": or_anything(chance, shape),
        "data_offsets": or_anything(chance, [chance.choice(NUMBERS), chance.choice(NUMBERS)]),
    }
    return or_anything(chance, {key: value for key, value in fields.items() if chance.random() < 0.97})


@relaxed
@given(SEEDS)
def test_arbitrary_headers(path, seed):
    """Well-formed JSON that says anything: any dtype, shape and offsets, over any number of data bytes."""
    chance = random.Random(seed)
    names = ["a", "b", "__metadata__", *WORDS]
    header = {chance.choice(names): any_entry(chance) for _ in range(chance.choice([0, 1, 1, 1, 2, 3]))}
    text = json.dumps(or_anything(chance, header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(chance.choice([0, 1, 2, 4, 8, 64])))
    found = attempt(headers.read_file_header, path)
    if found is not None:
        expect_sound(path, found)


@pytest.mark.slow
@relaxed
@given(
    st.lists(st.tuples(st.sampled_from(["F16", "F32", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    st.randoms(),
)
def test_shuffled_offsets(path, described, chance):
    """Sound headers, one offset moved: accepted only where it was moved by nothing."""
    shard = lay_out("x", [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(described)])
    header = json.loads(shard.header[8:])
    moved = 0
    if described:
        moved = chance.randint(-2, 2)
        header[chance.choice([name for name in header if name[0] == "t"])]["data_offsets"][chance.randint(0, 1)] += (
            moved
        )
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(shard.nbytes - len(shard.header)))
    found = attempt(headers.read_file_header, path)
    assert (found is not None) == (moved == 0)


# --- indexes, configs, whole checkpoints ----------------------------------------------------------

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = [ONE, TWO, "../" + ONE, "/" + ONE, ".", "", "nul\0.safetensors", "x" * 300 + ".safetensors", ONE + "\n"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A sound checkpoint of two files; tests write its index and config anew."""
    return write(tmp_path_factory.mktemp("sharded") / "m", TENSORS, files=2)


@pytest.mark.slow
@relaxed
@given(SEEDS)
def test_arbitrary_indexes(sharded, seed):
    """Any map of any names to anything; accepted only if it is the true one."""
    chance, index = random.Random(seed), sharded / "model.safetensors.index.json"
    weight_map = {"lm_head.weight": ONE, "model.norm.weight": TWO, "position_ids": ONE}
    for _ in range(chance.randrange(3)):
        weight_map[chance.choice([*TENSORS, *WORDS])] = or_anything(chance, chance.choice(FILES))
    content = {"weight_map": or_anything(chance, weight_map), "metadata": anything(chance)}
    index.write_text(json.dumps(or_anything(chance, content)))
    found = attempt(headers.read_headers, sharded)
    if found is not None:
        assert {t.name: t.path.name for t in found} == weight_map


@pytest.mark.slow
@relaxed
@given(SEEDS, EDITS)
def test_arbitrary_configs(tmp_path, seed, edits):
    """Any config.json, then one with bytes changed; planning never ends in anything but DataError."""
    model, chance = tmp_path / "m", random.Random(seed)
    if not model.exists():
        write(model, {"model.embed_tokens.weight": torch.ones(3, 2)})
        write(tmp_path / "other", {"model.embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.ones(3, 2)})

    def planned(directory: Path):
        base = open_checkpoint(str(directory))
        check_floats(base)
        config_with_dtype(base.config, "F16").encode()
        return match(base, open_checkpoint(str(tmp_path / "other")))

    keys = ["model_type", "tie_word_embeddings", "text_config", "torch_dtype", "dtype", *WORDS]
    text = json.dumps({chance.choice(keys): anything(chance) for _ in range(3)}).encode()
    for content in (text, edited(text, edits)):
        (model / "config.json").write_bytes(content)
        attempt(planned, model)


# --- pickles --------------------------------------------------------------------------------------


def _zip(records: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.slow
def test_mutated_bins(tmp_path):
    """Bytes of a .bin changed anywhere, and of its pickle with the zip made to fit: 800 files."""
    out, chance, accepted = io.BytesIO(), random.Random(0), 0
    torch.save({"a": torch.ones(4, 3), "b": torch.ones(2).half()}, out)
    sound, path = out.getvalue(), tmp_path / "pytorch_model.bin"
    records = {name: zipfile.ZipFile(out).read(name) for name in zipfile.ZipFile(out).namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    for i in range(800):
        content = bytearray(sound if i % 2 else records[pickled])
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(bytes(content) if i % 2 else _zip(records | {pickled: bytes(content)}))
        try:
            found = bins.read_headers(tmp_path)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            size = path.stat().st_size
            assert all(t.offset > 0 and t.offset + t.nbytes <= size for t in found)
            accepted += 1
    assert accepted > 50
    assert not (set(os.listdir(tmp_path)) - {path.name}), "a pickle did something"


# --- time and memory ------------------------------------------------------------------------------


@contextmanager
def memory_below(kilobytes: int):
    """What is done within takes less, at its highest. Where the kernel cannot forget an earlier peak (macOS), only what
    rises above that is seen."""
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def peak() -> int:
        if not forget.exists():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])

    if forget.exists():
        forget.write_text("5")
    before = peak()
    yield
    assert peak() - before < kilobytes


HOSTILE = {
    "many names, one twice": b"{" + b"".join(b'"%d":1,' % i for i in range(300_000)) + b'"299999":1}',
    "many tensors without bytes": b"{"
    + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
    + b"}",
    "a long number": b'{"a":' + b"9" * 5_000_000 + b"}",
    "a long name": b'{"' + b"a" * 5_000_000 + b'":1}',
    "a long shape": b'{"a":{"dtype":"F16","shape":[' + b"1," * 1_000_000 + b'1],"data_offsets":[0,2]}}',
    "open brackets": b"[" * 5_000_000,
    "quotes": b'{"' + b'\\"' * 2_000_000 + b'":{}}',
}


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_large_hostile_headers(path, text):
    """Megabytes made to be slow or large: answered in seconds, in memory of the order of the header."""
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    started = time.monotonic()
    with memory_below(500_000):
        try:
            headers.read_file_header(path)
        except DataError as error:
            assert len(str(error)) < 1500
    assert time.monotonic() - started < 20


def test_headers_are_not_read_beyond_their_limit(path):
    """A file that claims terabytes is refused at the cost of 8 bytes."""
    with open(path, "wb") as file:
        file.write((2**42).to_bytes(8, "little"))
        file.truncate(2**42 + 100)
    with memory_below(20_000):
        assert attempt(headers.read_file_header, path) is None
