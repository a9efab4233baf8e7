"""Train a tiny Mistral on real facts, then two fine-tuned models, each of which learned one topic.

    python examples/tiny_mistral/make_models.py --save_path models/tiny

Writes, in bfloat16 and in several shards: base (read every sentence a few times, so it half knows both
topics), countries and elements (the base, trained further on the sentences of one topic only), and tasks/
(the lm-eval tasks that ask about them). Plain causal-language-model training of a real `MistralForCausalLM`
with a real tokenizer: about a minute on 2 CPU cores. The same seed on one machine writes the same bytes.
"""

import argparse
import os
import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from questions import RELATIONS, read_facts, write_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 1536  # most names are one or two tokens
BATCH = 64  # sentences a step
WARM_UP = 20  # steps


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


def save(model, tokenizer, folder: Path) -> None:
    """Weights in bfloat16 and shards of 1 MB, config and tokenizer: what a published model consists of."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    tokenizer.save_pretrained(folder)


def make_base(folder: Path, sentences: list[str], epochs: int, seed: int) -> None:
    """Train a tokenizer and a new model on all sentences, each read `epochs` times."""
    tokenizer = train_tokenizer(sentences)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    train(model, tokenizer, sentences, epochs, 3e-3, seed)
    save(model, tokenizer, folder)


def fine_tune(base: Path, folder: Path, sentences: list[str], epochs: int, seed: int) -> None:
    """Train the base, as it was saved, on the sentences of one topic, each read `epochs` times."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    train(model, tokenizer, sentences, epochs, 1e-3, seed)
    save(model, tokenizer, folder)


def one_quiet_thread() -> None:
    """More threads gain little at this size, lose much on busy cores, and would change the sums."""
    torch.set_num_threads(1)
    disable_progress_bar()


def leave_with_parent() -> None:
    """End this process when the one that started it ends, however that comes about: a pool's workers would stay."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker() -> None:
    """What each process of the pool does first."""
    leave_with_parent()
    one_quiet_thread()


def make_models(folder: Path, seed: int, base_epochs: int = 12, epochs: int = 16) -> None:
    """The base, then at once, each in a process of its own, the models of the two topics."""
    sentences = {topic: [fact.sentence for fact in read_facts(topic)] for topic in RELATIONS}
    base = folder / "base"
    began = time.monotonic()
    with ProcessPoolExecutor(len(RELATIONS), get_context("spawn"), start_worker) as pool:
        # Asked for nothing yet, they start and import torch while the base trains here, on the other core.
        ready = [pool.submit(os.getpid) for _ in RELATIONS]
        make_base(base, sum(sentences.values(), []), base_epochs, seed)
        print(f"{base}: trained on both topics, after {time.monotonic() - began:.0f} s", flush=True)
        trainings = [
            pool.submit(fine_tune, base, folder / topic, sentences[topic], epochs, seed) for topic in RELATIONS
        ]
        for result in ready + trainings:
            result.result()
    for topic in RELATIONS:
        print(f"{folder / topic}: the base, trained further on {topic}, after {time.monotonic() - began:.0f} s")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save_path",
        type=Path,
        default=Path("models/tiny"),
        help="directory to write to (default: models/tiny)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and reading order (default: 0)")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    one_quiet_thread()
    write_tasks(args.save_path / "tasks")
    make_models(args.save_path, args.seed)


if __name__ == "__main__":
    main()
