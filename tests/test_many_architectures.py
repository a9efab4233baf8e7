"""A broad set of architectures: the state dict as someone saved it against the files that save_pretrained writes."""

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as t
from checkpoints import extract, load, write
from tiny_configs import BART, LLAMA, SMALL, moved

pytestmark = pytest.mark.slow

TINY = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(TINY, image_size=4, patch_size=2)
TEXT = dict(TINY, vocab_size=19, max_position_embeddings=8)
T5 = dict(vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
MROPE = dict(LLAMA, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 0]})
KINDS = {
    "MBartForConditionalGeneration": lambda: t.MBartConfig(**BART),
    "PegasusForConditionalGeneration": lambda: t.PegasusConfig(**BART),
    "MT5ForConditionalGeneration": lambda: t.MT5Config(**T5),
    "ElectraForMaskedLM": lambda: t.ElectraConfig(**SMALL, embedding_size=6, max_position_embeddings=16),
    "DebertaV2ForMaskedLM": lambda: t.DebertaV2Config(**SMALL, max_position_embeddings=16, relative_attention=True),
    "AlbertForMaskedLM": lambda: t.AlbertConfig(**SMALL, embedding_size=6, max_position_embeddings=16),
    "ViTForImageClassification": lambda: t.ViTConfig(**VISION),
    "CLIPModel": lambda: t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=4),
    "Gemma2ForCausalLM": lambda: t.Gemma2Config(**LLAMA, head_dim=4),
    "CohereForCausalLM": lambda: t.CohereConfig(**LLAMA),
    "MptForCausalLM": lambda: t.MptConfig(vocab_size=19, d_model=8, n_layers=1, n_heads=2, max_seq_len=8),
    "MambaForCausalLM": lambda: t.MambaConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, state_size=4),
    "GptOssForCausalLM": lambda: t.GptOssConfig(**LLAMA, head_dim=4, num_local_experts=2, num_experts_per_tok=1),
    "LlavaNextForConditionalGeneration": lambda: t.LlavaNextConfig(
        text_config=t.LlamaConfig(**LLAMA).to_dict(),
        vision_config=t.CLIPVisionConfig(**VISION).to_dict(),
        image_token_index=18,
    ),
    "Qwen2VLForConditionalGeneration": lambda: t.Qwen2VLConfig(
        text_config=dict(MROPE, tie_word_embeddings=True),
        vision_config=dict(
            depth=1,
            embed_dim=8,
            hidden_size=8,
            num_heads=2,
            mlp_ratio=2,
            patch_size=2,
            temporal_patch_size=1,
            spatial_merge_size=1,
        ),
    ),
    "EncoderDecoderModel": lambda: t.EncoderDecoderConfig.from_encoder_decoder_configs(
        t.BertConfig(**SMALL, max_position_embeddings=16),
        t.BertConfig(**SMALL, max_position_embeddings=16, is_decoder=True, add_cross_attention=True),
    ),
    "Wav2Vec2ForCTC": lambda: t.Wav2Vec2Config(
        **TINY,
        vocab_size=11,
        conv_dim=[4],
        conv_stride=[2],
        conv_kernel=[3],
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
}


@cache
def made(kind: str, folder: Path) -> tuple[dict, dict, dict, dict]:
    """(files' tensors, state dict) of a base and of a fine-tuned model; folder/kind/base and ft are saved."""
    torch.manual_seed(0)
    model = getattr(t, kind)(KINDS[kind]()).half()
    found = []
    for name in ("base", "ft"):
        model.save_pretrained(folder / kind / name)
        found += [load(folder / kind / name), {n: x.clone() for n, x in model.state_dict().items()}]
        model.load_state_dict(moved(model.state_dict()))
    return tuple(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("many")


@pytest.mark.parametrize("wrap", ["_orig_mod.", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_the_model_it_was_taken_from(folder, tmp_path, kind, wrap):
    """Other names, ties spelled out, wrapped: the vector that the saved files give, whichever side it is."""
    base, base_state, fine, fine_state = made(kind, folder)
    config = (folder / kind / "base" / "config.json").read_text()
    for name, tensors in (("state", fine_state), ("state_base", base_state)):
        write(tmp_path / name, {wrap + n: x for n, x in tensors.items()})
        (tmp_path / name / "config.json").write_text(config)
    extract(folder / kind / "ft", folder / kind / "base", tmp_path / "v")
    extract(tmp_path / "state", folder / kind / "base", tmp_path / "v_state")
    want, got = load(tmp_path / "v"), load(tmp_path / "v_state")
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert sum(bool(x.any()) for x in want.values()) > len(want) // 2
    extract(folder / kind / "ft", tmp_path / "state_base", tmp_path / "v_base")
    for name, vector in load(tmp_path / "v_base").items():
        mine, theirs = base_state[name.removeprefix(wrap)], fine_state[name.removeprefix(wrap)]
        assert torch.equal(vector, (theirs.float() - mine.float()).half() if mine.is_floating_point() else mine), name
