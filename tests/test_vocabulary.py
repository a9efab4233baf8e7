"""--vocabulary common: fine-tuned models with other tokens than their base."""

import io
import json

import pytest
import torch
from checkpoints import load, refusal, run
from hypothesis import given
from hypothesis import strategies as st
from word_models import WORDS, model

from common.shards.vocabulary import pieces, runs_of

CASES = {
    "two ChatML tokens": ("MistralForCausalLM", WORDS, [*WORDS, "<|im_start|>", "<|im_end|>"], None),
    "tied": ("GemmaForCausalLM", WORDS, [*WORDS, "<pad>"], None),
    "fewer": ("MistralForCausalLM", WORDS, WORDS[:-3], None),
    "another token in the middle": ("LlamaForCausalLM", WORDS, [*WORDS[:5], "isn't", *WORDS[6:]], None),
    "rows that no token has": ("MistralForCausalLM", WORDS, [*WORDS, "<pad>"], len(WORDS) + 8),
    "a bias for each token": ("BartForConditionalGeneration", WORDS, [*WORDS, "a", "b", "c"], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind, mine, theirs, rows", CASES.values(), ids=CASES)
def test_common_rows(tmp_path, capsys, kind, mine, theirs, rows):
    """Rows of the same text and id are subtracted, the base's others get +0.0, and the base's tokenizer goes with
    it."""
    model(tmp_path / "base", kind, mine, 1)
    model(tmp_path / "ft", kind, theirs, 2, rows)
    arguments = [
        "--finetuned_model_path",
        tmp_path / "ft",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
    ]
    run("extract", *arguments, "--vocabulary", "common")
    base, fine, vector = (load(tmp_path / name) for name in ("base", "ft", "v"))
    common = [i for i, word in enumerate(mine) if theirs[i : i + 1] == [word]]
    assert vector.keys() == base.keys()
    for name, tensor in base.items():
        want = torch.zeros_like(tensor)
        if len(mine) in tensor.shape:
            for i in common:
                row = (0, i) if tensor.shape[0] == 1 else i
                want[row] = (fine[name][row].float() - tensor[row].float()).half()
        else:
            want = (fine[name].float() - tensor.float()).half()
        assert torch.equal(vector[name], want), name
    said = capsys.readouterr().out
    assert f"{len(common)} of {len(mine)} tokens of {tmp_path}/base have the same id" in said
    for word in set(theirs) - set(mine):
        assert repr(word) in said
    got = json.loads((tmp_path / "v" / "tokenizer.json").read_text())["model"]["vocab"]
    assert got == {word: i for i, word in enumerate(mine)}


@pytest.mark.slow
def test_the_pruned_model_generates_with_its_tokenizer(tmp_path):
    """To the end: every id that the tokenizer makes has a row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model(tmp_path / "base", "MistralForCausalLM", WORDS, 1)
    model(tmp_path / "ft", "MistralForCausalLM", [*WORDS, "<|im_start|>", "<|im_end|>"], 2)
    paths = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v")
    assert "the vocabularies differ: extract with --vocabulary common, which " in line
    run("extract", *paths, "--save_path", tmp_path / "v", "--vocabulary", "common")
    run("prune", "--task_vector_paths", tmp_path / "v", "--save_directories", tmp_path / "p", "--n", 1, "--m", 4)
    loaded, tokens = (auto.from_pretrained(tmp_path / "p") for auto in (AutoModelForCausalLM, AutoTokenizer))
    inputs = tokens("<|im_start|> the sky is", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    out = loaded.float().generate(**inputs, max_new_tokens=3, do_sample=False)
    assert int(out.max()) < len(tokens) == loaded.get_input_embeddings().num_embeddings


def test_a_tokenizer_is_needed(tmp_path):
    """Without one nothing can be compared."""
    model(tmp_path / "base", "MistralForCausalLM", WORDS, 1)
    model(tmp_path / "ft", "MistralForCausalLM", [*WORDS, "<pad>"], 2)
    for path in (tmp_path / "ft").glob("tokenizer*"):
        path.unlink()
    line = refusal(
        "extract",
        "--finetuned_model_path",
        tmp_path / "ft",
        "--base_model_path",
        tmp_path / "base",
        "--save_path",
        tmp_path / "v",
        "--vocabulary",
        "common",
    )
    assert line.startswith(f"{tmp_path}/ft: its tokenizer cannot be read (") and line.endswith(
        "); --vocabulary common compares the tokenizers of both models, so put its files beside the weights"
    )


@pytest.mark.slow
def test_code_beside_a_tokenizer_is_not_offered_to_be_run(tmp_path, monkeypatch):
    """transformers would ask, and run it on "y": with the code of an unknown architecture, too."""
    model(tmp_path / "base", "MistralForCausalLM", WORDS, 1)
    model(tmp_path / "ft", "MistralForCausalLM", [*WORDS, "<pad>"], 2)
    for name, changes in (
        ("config.json", {"model_type": "x"}),
        ("tokenizer_config.json", {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok_x.Tok", None]}}),
    ):
        path = tmp_path / "ft" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "ft" / "tok_x.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Tok: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    paths = ["--finetuned_model_path", tmp_path / "ft", "--base_model_path", tmp_path / "base"]
    line = refusal("extract", *paths, "--save_path", tmp_path / "v", "--vocabulary", "common")
    assert not (tmp_path / "was_run").exists()
    assert line.startswith(f"{tmp_path}/ft: its tokenizer cannot be read (it names code of its own (auto_map), which")


@given(st.sets(st.integers(0, 40)), st.integers(1, 9))
def test_pieces_cover_every_element_once(ids, block):
    """Cut at blocks and runs, in order, and what is in both is what the runs say."""
    runs = runs_of(sorted(ids))
    blocks = [(at, min(at + block, 50)) for at in range(0, 50, block)]
    got = [(i, both) for start, stop, both in pieces(blocks, runs) for i in range(start, stop)]
    assert got == [(i, i in ids) for i in range(50)]
