"""What the example trains on and asks: the demo's facts, and plain text that has nothing to do with them.

    python examples/smollm2/facts.py models/smollm2/tasks      # write the lm-eval tasks that the recipes name

Fine-tuning reads each of 210 facts of its topic as one sentence; a question is the sentence's beginning with four ways
to end it. So the score says what a merged model still knows of what both fine-tuned ones were taught; λ is chosen on
some of the facts and reported on others. The control is what it says of 32 paragraphs that neither was trained on, in
bits per byte.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tiny_mistral"))  # the facts and how they are asked are the demo's
from questions import RELATIONS, read_facts, split_facts, write_tasks  # noqa: E402

TOPICS = tuple(RELATIONS)
ITEMS = {"val": 60, "test": 150}  # facts of each topic: what one hour on 2 cores allows

CONTROL = """\
task: smollm2_plain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {paragraphs}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
process_results: !function control.bits_a_byte
metric_list: [{{metric: bits_a_byte, aggregation: mean, higher_is_better: false}}]
metadata: {{version: 1.0}}
"""


def sentences_of(topic: str) -> list[str]:
    """What a model learns about 'countries' or 'elements': each fact that is asked, "The capital of Namibia is
    Windhoek."…
    """
    splits = split_facts(read_facts(topic))
    return [fact.sentence for split, count in ITEMS.items() for fact in splits[split][:count]]


def paragraphs() -> list[str]:
    """The control's plain text, some sixty words each."""
    return (HERE / "plain.txt").read_text(encoding="utf-8").strip().split("\n\n")


def write_control(folder: Path) -> None:
    """Write the task smollm2_plain, its paragraphs as .jsonl and the function that scores them."""
    texts = folder.resolve() / "smollm2_plain.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs()))
    (folder / "smollm2_plain.yaml").write_text(CONTROL.format(paragraphs=json.dumps(str(texts))))
    (folder / "control.py").write_text((HERE / "control.py").read_text())


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "models/smollm2/tasks")
    write_tasks(folder, "smollm2", ITEMS)
    write_control(folder)
    print(f"{folder}: {sum(ITEMS.values()) * len(TOPICS)} questions, {len(paragraphs())} paragraphs")


if __name__ == "__main__":
    main()
