"""Tiny models of several architectures whose tokenizers know a list of words, an id for each."""

from pathlib import Path

import torch

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    *["the", "sky", "is", "blue", "and", "grass", "green", "snow", "white", "coal", "black", "lemon", "yellow"],
]
TINY = dict(
    num_key_value_heads=2,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
)


def tokenizer(words: list[str]):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model(directory: Path, kind: str, words: list[str], seed: int, rows: int | None = None) -> Path:
    """A model with a row for each word, or `rows`, and its tokenizer."""
    import transformers

    settings = dict(TINY, vocab_size=rows or len(words), bos_token_id=1, eos_token_id=2)
    if kind == "BartForConditionalGeneration":
        small = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
        settings = dict(settings, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, **small)
    torch.manual_seed(seed)
    config = getattr(transformers, kind.replace("ForCausalLM", "Config").replace("ForConditionalGeneration", "Config"))
    getattr(transformers, kind)(config(**settings)).half().save_pretrained(directory)
    tokenizer(words).save_pretrained(directory)
    return directory
