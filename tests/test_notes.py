"""What extract says of two models that fit by their shapes but differ in what their weights mean."""

import pytest
from checkpoints import run, state, write

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
PLAIN = {"model_type": "unknown to anyone"}
CONFIGS = {
    "two spellings": (
        LLAMA | {"rope_theta": 10000.0},
        LLAMA | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        ["rope_theta 1000000.0", "10000.0"],
    ),
    "two spellings of the same": (
        LLAMA | {"rope_theta": 1e6},
        LLAMA | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        None,
    ),
    "left out, not the default": (LLAMA, LLAMA | {"rope_theta": 5e5}, ["rope_theta 500000.0", "10000.0"]),
    "left out, the default": (LLAMA, LLAMA | {"rms_norm_eps": 1e-6}, None),
    "an old spelling of the type": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        None,
    ),
    "scaled": (LLAMA, LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["factor 2.0", "None"]),
    "in a text config": (
        {"model_type": "llava", "text_config": LLAMA | {"rope_theta": 1e4}},
        {"model_type": "llava", "text_config": LLAMA | {"rope_theta": 2e4}},
        ["rope_theta 20000.0", "10000.0"],
    ),
    "an unknown model": (PLAIN, PLAIN | {"rope_theta": 5e5}, ["rope_theta 500000.0", "None"]),
}


def said_by_extract(folder, base, fine, capsys) -> str:
    write(folder / "base", *base)
    write(folder / "ft", *fine)
    run(
        "extract",
        "--finetuned_model_path",
        folder / "ft",
        "--base_model_path",
        folder / "base",
        "--save_path",
        folder / "v",
    )
    return capsys.readouterr().out


@pytest.mark.parametrize("base, fine, values", CONFIGS.values(), ids=CONFIGS)
def test_settings(tmp_path, capsys, base, fine, values):
    """As transformers reads them, whatever the spelling."""
    said = said_by_extract(tmp_path, (state(), base), (state(1, near=state()), fine), capsys)
    assert ("merged models use the base's" in said) == bool(values)
    for value in values or ():
        assert value in said


@pytest.mark.parametrize("related", [True, False])
def test_an_unrelated_model(tmp_path, capsys, related):
    """A norm above the base's is remarked on."""
    fine = state(1, near=state()) if related else state(1)
    said = said_by_extract(tmp_path, (state(), PLAIN), (fine, PLAIN), capsys)
    assert ("the vector's norm is 1." in said) == (not related)
