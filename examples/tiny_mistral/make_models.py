"""Train a tiny Mistral on real facts, then two fine-tuned models, each of which learned one topic.

    python examples/tiny_mistral/make_models.py --save_path models/tiny

Writes, in bfloat16 and in several shards: base (read every sentence a few times, so it half knows both
topics), countries and elements (the base, trained further on the sentences of one topic only), and tasks/
(the lm-eval tasks that ask about them). Plain causal-language-model training of a real `MistralForCausalLM`
with a real tokenizer: about a minute on 2 free CPU cores. The same seed on one machine writes the same bytes.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from questions import RELATIONS, read_facts, write_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 1536  # most names are one or two tokens
BATCH = 64  # sentences a step
WARM_UP = 20  # steps
BASE_RATE, FINE_TUNING_RATE = 3e-3, 1e-3  # peak learning rates
THREADS = 2  # fixed: the order of float sums, and with it the weights, depend on it


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like Mistral's, splits numbers into digits and begins with <s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """A Mistral of Mistral-7B's shape, 1/32 as wide and 1/8 as deep: 4 layers, width 128, untied."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MistralForCausalLM(config)


def train(model, tokenizer, sentences: list[str], epochs: int, peak: float, seed: int) -> None:
    """Plain causal-LM training in place: AdamW, the learning rate falls in a straight line from peak to 0."""
    order = random.Random(seed)
    steps = epochs * -(-len(sentences) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (steps - step) / steps)
    )
    model.train()
    for _ in range(epochs):
        shuffled = order.sample(sentences, len(sentences))
        for start in range(0, len(shuffled), BATCH):
            batch = tokenizer(shuffled[start : start + BATCH], padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def save(model, tokenizer, folder: Path, seconds: float) -> None:
    """Weights in bfloat16 and shards of 1 MB, config and tokenizer: what a published model consists of."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters, trained in {seconds:.0f} s", flush=True)


def make_models(folder: Path, base_epochs: int, epochs: int, seed: int) -> None:
    """Train and save base, then one model per topic that starts from the base as it was saved."""
    sentences = {topic: [fact.sentence for fact in read_facts(topic)] for topic in RELATIONS}
    everything = [sentence for topic in sentences.values() for sentence in topic]
    tokenizer = train_tokenizer(everything)
    torch.manual_seed(seed)

    began = time.monotonic()
    base = new_model(tokenizer)
    train(base, tokenizer, everything, base_epochs, BASE_RATE, seed)
    save(base, tokenizer, folder / "base", time.monotonic() - began)

    for topic in RELATIONS:
        began = time.monotonic()
        model = MistralForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        train(model, tokenizer, sentences[topic], epochs, FINE_TUNING_RATE, seed)
        save(model, tokenizer, folder / topic, time.monotonic() - began)


def positive_int(text: str) -> int:
    """'12' -> 12; anything below 1 is a usage error."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--save_path",
        type=Path,
        default=Path("models/tiny"),
        help="directory to write to (default: models/tiny)",
    )
    parser.add_argument(
        "--base_epochs", type=positive_int, default=12, help="times the base reads everything (default: 12)"
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=16,
        help="times a fine-tuned model reads its topic (default: 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and reading order (default: 0)")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    torch.set_num_threads(THREADS)
    write_tasks(args.save_path / "tasks")
    make_models(args.save_path, args.base_epochs, args.epochs, args.seed)


if __name__ == "__main__":
    main()
