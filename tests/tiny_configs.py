"""What tiny models of many architectures share: sizes for their configs, and what fine-tuning does to them."""

import torch

SMALL = dict(vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
LLAMA = dict(SMALL, num_key_value_heads=2, max_position_embeddings=16)
BART = dict(
    vocab_size=19,
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    max_position_embeddings=16,
)


def moved(tensors: dict) -> dict:
    """A fine-tuned model: every floating-point value moved a little, the same way in equal tensors."""
    generator = torch.Generator().manual_seed(5)
    steps = {}
    for tensor in tensors.values():
        key = tensor.numpy().tobytes()
        if key not in steps:
            steps[key] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return {n: steps[t.numpy().tobytes()].clone() if t.is_floating_point() else t for n, t in tensors.items()}
