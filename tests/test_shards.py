"""Files that others read: byte-identical to safetensors' own, cut as planned, loaded by transformers."""

import json
import os
import stat

import hypothesis.strategies as st
import oracle
import pytest
import torch
from checkpoints import CONFIG, SHAPES, extract, load, prune, run, state, write
from conftest import save_model
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from safetensors.torch import save, save_file

from common.shards.headers import DTYPE_BYTES, read_file_header
from common.shards.layout import index_text, lay_out, partition, plan_shards

# safetensors orders a file by dtype, widest first, in this order, then by name.
TORCH = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(TENSORS)
def test_files_are_those_of_save_file(tmp_path_factory, described):
    """Header and offsets, for any names, dtypes and shapes; and our reader finds each tensor in it."""
    order = sorted(described, key=lambda name: (list(TORCH).index(described[name][0]), name.encode()))
    tensors = {name: torch.ones(described[name][1], dtype=TORCH[described[name][0]]) for name in order}
    theirs = save(tensors, metadata={"format": "pt"})
    ours = lay_out("x", [(name, *described[name]) for name in order])
    assert theirs.startswith(ours.header) and ours.nbytes == len(theirs)
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    path.write_bytes(theirs)
    found = [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in read_file_header(path)]
    planned = [(s.name, s.dtype, s.shape, s.offset, s.nbytes) for s in ours.slots]
    assert sorted(found) == sorted(planned)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_converted_file_is_that_of_save_file(tmp_path, dtype):
    """The whole file, weights included, from a model of mixed dtypes and buffers in order of their names."""
    tensors = state(1, torch.float32) | {"z.half": state(2)["model.norm.weight"], "position_ids": torch.arange(9)}
    write(tmp_path / "model", tensors)
    run("convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--dtype", dtype)
    want = {
        name: t if name == "position_ids" else oracle.convert(t, getattr(torch, dtype)) for name, t in tensors.items()
    }
    ours = load(tmp_path / "out")
    save_file({name: ours[name] for name in sorted(want)}, tmp_path / "theirs", metadata={"format": "pt"})
    assert all(oracle.same(ours[name], want[name]) for name in want)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


# --- shards ---------------------------------------------------------------------------------------

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 50), min_size=1, max_size=30)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 80))
def test_partition_is_greedy(sizes, limit):
    """In order, nothing lost; within the limit unless alone; and no shard could have taken the next tensor."""
    groups = partition(sizes, limit)
    assert [name for group in groups for name in group] == list(sizes)
    totals = [sum(sizes[name] for name in group) for group in groups]
    assert all(total <= limit or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    for total, after in zip(totals, groups[1:], strict=False):
        assert total + sizes[after[0]] > limit


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_shards_are_cut_and_named_as_the_hub_does(sizes):
    """huggingface_hub's own split gives the same files where no tensor is larger than a shard."""
    theirs = split_state_dict_into_shards_factory(
        {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()},
        get_storage_size=torch.numel,
        get_storage_id=lambda tensor: None,
        max_shard_size=60,
        filename_pattern="model{suffix}.safetensors",
    )
    shards = plan_shards([(name, "U8", (size,)) for name, size in sizes.items()], 60)
    assert {shard.filename: [slot.name for slot in shard.slots] for shard in shards} == theirs.filename_to_tensors
    index = json.loads(index_text(shards))
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {s.name: shard.filename for shard in shards for s in shard.slots}


def test_output_layouts(tmp_path):
    """One file and no index, or an index and its files, none over the limit; the same tensors."""
    model = write(tmp_path / "model", state(dtype=torch.float32), files=3)
    run("convert", "--model_path", model, "--save_path", tmp_path / "one")
    run("convert", "--model_path", model, "--save_path", tmp_path / "many", "--max_shard_size", "200B")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "convert_report.json",
        "model.safetensors",
    ]
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(torch.Size(shape).numel() * 2 for shape in SHAPES.values())
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert one.keys() == many.keys() == SHAPES.keys()
    assert all(oracle.same(one[name], many[name]) for name in one)
    for shard in shards:
        held = read_file_header(tmp_path / "many" / shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= 200


def test_every_tensor_is_aligned():
    """Mixed widths in one file: each tensor starts at a multiple of its element size."""
    shard = lay_out("x", [("a", "U8", (3,)), ("b", "F32", (1,)), ("c", "F16", (1,)), ("d", "I64", (1,))])
    assert all(slot.offset % DTYPE_BYTES[slot.dtype] == 0 for slot in shard.slots)


@pytest.mark.parametrize(
    "mask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask(tmp_path, mask, file_mode, folder_mode):
    model = write(tmp_path / "model", state())
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer.json").chmod(0o400)
    before = os.umask(mask)
    try:
        run("convert", "--model_path", model, "--save_path", tmp_path / "out", "--max_shard_size", "300B")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {file_mode} and "tokenizer.json" in modes, modes


# --- what transformers makes of it ----------------------------------------------------------------


def test_transformers_loads_model_and_tokenizer(tmp_path):
    """Every output of the chain, in its own dtype, with a tokenizer and the chat template beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_model(tmp_path / "base", 0, "bfloat16")
    save_model(tmp_path / "fine", 1, "bfloat16")
    (tmp_path / "fine" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "fine" / "modeling_evil.py").write_text("raise SystemExit('imported')")
    run("convert", "--model_path", base, "--save_path", tmp_path / "half", "--max_shard_size", "20KB")
    extract(tmp_path / "fine", tmp_path / "half", tmp_path / "vector")
    prune([tmp_path / "vector"], [tmp_path / "pruned"], "--n", 1, "--m", 4)
    for name in ("half", "vector", "pruned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
        stored = load(tmp_path / name)
        assert all(oracle.same(model.state_dict()[key].cpu(), stored[key]) for key in stored)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.tokenize("the sky is blue") == ["the", "sky", "is", "blue"]
        assert (tmp_path / name / "chat_template.jinja").exists() == (name != "half")
        assert not list((tmp_path / name).glob("*.py"))
        assert (tmp_path / name / "generation_config.json").exists()


def test_config_says_the_dtype(tmp_path):
    """`dtype` is what the tensors are, nested configs included, and no stale torch_dtype is left."""
    nested = CONFIG | {"text_config": {"torch_dtype": "float32", "vocab_size": 3}, "vision_config": {"depth": 1}}
    write(tmp_path / "model", state(dtype=torch.float32), nested)
    run("convert", "--model_path", tmp_path / "model", "--save_path", tmp_path / "out", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "vocab_size": 3},
        "vision_config": {"depth": 1},
    }
