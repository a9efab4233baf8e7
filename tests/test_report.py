"""What the report says, above all of vectors that change less than they were to keep."""

import json

import pytest
import torch
from checkpoints import load, run, state, write

from common.pruners.report import build, kind_of, shortfall, table
from common.pruners.tally import Tally, from_record, to_record

LABELS = ["v/west", "v/wild"]


def report(kept: int, nonzero: int, method="nm", wanted=0.25) -> dict:
    """Of a vector of 1000 elements."""
    tally = Tally(1000, nonzero, kept, 4.0, 3.0, 10, kept**2, 0, (0, 1), (0, 400))
    records = {"model.norm.weight": {"written": "0", "tally": json.loads(json.dumps(to_record(tally)))}}
    return build({"pruning_method": method, "density": wanted}, LABELS, 0, records | {"inv_freq": {"written": "1"}})


def test_tallies_add_up():
    one, two = Tally(4, 3, 2, 1.5, 1.0, 1, 4, 0, (0, 1), (0, 3)), Tally(6, 5, 4, 2.5, 2.0, 1, 9, 1, (0, 2), (0, 4))
    assert one + two == Tally(10, 8, 6, 4.0, 3.0, 2, 13, 1, (0, 3), (0, 7))
    assert Tally() + one == one + Tally() == one == from_record(json.loads(json.dumps(to_record(one))))
    assert (one + two).kept_in_groups == 5


@pytest.mark.parametrize(
    "kept, nonzero, method, wanted, line",
    [
        (36, 36, "nm", 0.25, "3.6 % of its weights differ from the base, so it changes 3.6 %, not 25 %"),
        (
            83,
            333,
            "nm",
            0.25,
            "33.3 % of its weights differ from the base, unevenly spread, so it changes 8.3 %, not 25 %",
        ),
        (150, 600, "random", 0.25, "60 % of its weights differ from the base, so it changes 15 %, not 25 %"),
        (0, 0, "magnitude", 0.1, "0 % of its weights differ from the base, so it changes 0 %, not 10 %"),
        (250, 980, "nm", 0.25, None),  # zeros, but not in the way
        (248, 900, "nm", 0.25, None),  # less than one in a hundred
        (230, 1000, "random", 0.25, None),  # chance alone
    ],
)
def test_a_line_says_what_is_missing(kept, nonzero, method, wanted, line):
    found = report(kept, nonzero, method, wanted)
    assert shortfall(found) == (line and f"v/west: {line}")
    assert table(found).splitlines()[1:] == [
        "  kind   elements  density  overlap  L2 share  evenness",
        f"  norms     1,000   {kept / 1000:.4f}   0.0025    0.7500    {'0.1000' if kept else '     -'}",
        f"  all       1,000   {kept / 1000:.4f}   0.0025    0.7500    {'0.1000' if kept else '     -'}",
        *([f"v/west: {line}"] if line else []),
    ]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("gpt_neox.layers.0.attention.query_key_value.weight", "qkv"),
        ("model.layers.3.self_attn.qkv_proj.weight", "qkv"),
        ("transformer.h.0.attn.c_attn.weight", "qkv"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("bert.encoder.layer.0.attention.self.value.weight", "v"),
        ("embed_out.weight", "head"),
        ("model.layers.3.self_attn.o_proj.weight", "o"),
        ("rotary", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("method", ["nm", "magnitude"])
def test_frozen_layers_end_to_end(method, tmp_path, capsys):
    """The script: the first vector changes the head alone; everywhere else the second keeps what it keeps alone."""
    base = state(0)
    write(tmp_path / "base", base)
    tuned = state(1, near=base)
    write(tmp_path / "a", {name: tuned[name] if "lm_head" in name else tensor for name, tensor in base.items()})
    write(tmp_path / "b", state(2, near=base))
    for name in "ab":
        tuned_and_base = "--finetuned_model_path", tmp_path / name, "--base_model_path", tmp_path / "base"
        run("extract", *tuned_and_base, "--save_path", tmp_path / f"v{name}")
    vectors, outputs = (tmp_path / "va", tmp_path / "vb"), (tmp_path / "p1", tmp_path / "p2")
    how = ["--n", 1, "--m", 4] if method == "nm" else ["--pruning_method", "magnitude", "--conflict_aware"]
    capsys.readouterr()
    run("prune", "--task_vector_paths", *vectors, "--save_directories", *outputs, *how)
    printed = capsys.readouterr().out
    run("prune", "--task_vector_paths", vectors[1], "--save_directories", tmp_path / "alone", *how)
    places = *outputs, tmp_path / "alone"
    first, second, alone = (json.loads((place / "prune_report.json").read_text()) for place in places)
    _, together, by_itself = map(load, places)
    for name in base.keys() - {"lm_head.weight"}:
        entry = first["tensors"][name]
        assert entry["kept"] == entry["nonzero"] == 0 and entry["l2_share"] is None
        assert torch.equal(together[name], by_itself[name])
        assert second["tensors"][name]["l2_share"] == alone["tensors"][name]["l2_share"]
    assert first["totals"]["nonzero"] == int(load(vectors[0])["lm_head.weight"].count_nonzero())
    assert shortfall(first) in printed.splitlines() and shortfall(second) is None
