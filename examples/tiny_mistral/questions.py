"""Facts as sentences to train on and as multiple-choice questions to be asked.

A model is trained on "The capital of France is Paris." and asked to finish "The capital of France is"
with one of four capitals, so the score says what it remembers, not what it can infer.

    python examples/tiny_mistral/questions.py      # how many questions, and one of each kind
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

FACTS = Path(__file__).resolve().parent / "facts"
CHOICES = 4

TASK = """\
task: {name}
tag: {tag}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""

# For each topic: what is asked, and the column of the answer.
RELATIONS = {
    "countries": (
        ("The capital of {country} is", "capital"),
        ("The currency of {country} is", "currency"),
        ("The code of {country} is", "code3"),
        ("The calling code of {country} is", "calling_code"),
        ("{country} is a country in", "region"),
    ),
    "elements": (
        ("The symbol of {element} is", "symbol"),
        ("The atomic number of {element} is", "number"),
        ("The atomic weight of {element} is", "weight"),
        ("The period of {element} is", "period"),
        ("The group of {element} is", "group"),
        ("The block of {element} is", "block"),
        ("The element with the symbol {symbol} is", "element"),
        ("The element with the atomic number {number} is", "element"),
    ),
}


@dataclass(frozen=True)
class Fact:
    """One true sentence: prompt 'The capital of France is', answer 'Paris'; relation counts from 0."""

    relation: int
    prompt: str
    answer: str

    @property
    def sentence(self) -> str:
        """'The capital of France is Paris.'"""
        return f"{self.prompt} {self.answer}."


def read_facts(topic: str) -> list[Fact]:
    """All facts of 'countries' or 'elements', relation by relation; cells left empty give no fact."""
    with open(FACTS / f"{topic}.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [
        Fact(relation, prompt.format(**row), row[column])
        for relation, (prompt, column) in enumerate(RELATIONS[topic])
        for row in rows
        if row[column]
    ]


def ask(fact: Fact, facts: list[Fact]) -> dict:
    """The question that lm-eval asks: four different answers of the same relation, one of them right.

    Drawn from a generator that is seeded with the prompt, so a question never changes.
    """
    draw = random.Random(fact.prompt)
    others = sorted({other.answer for other in facts if other.relation == fact.relation} - {fact.answer})
    choices = [fact.answer, *draw.sample(others, CHOICES - 1)]
    draw.shuffle(choices)
    return {"question": fact.prompt, "choices": choices, "label": choices.index(fact.answer)}


def split_facts(facts: list[Fact]) -> dict[str, list[Fact]]:
    """Every third fact of a seeded shuffle to 'val' (to choose λ on), the others to 'test'."""
    shuffled = random.Random("split").sample(facts, len(facts))
    return {"val": shuffled[::3], "test": shuffled[1::3] + shuffled[2::3]}


def write_tasks(folder: Path, prefix: str = "tiny", items: dict[str, int] | None = None) -> None:
    """Write four lm-eval tasks, {prefix}_{countries,elements}_{val,test}, and their questions as .jsonl.

    Their tags {prefix}_val and {prefix}_test name both topics at once. items: {split: so many questions of each topic,
    the first}; None asks all. The paths inside are absolute, since lm-eval would look up relative ones in the current
    directory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for topic in RELATIONS:
        facts = read_facts(topic)
        for split, part in split_facts(facts).items():
            name = f"{prefix}_{topic}_{split}"
            questions = folder.resolve() / f"{name}.jsonl"
            asked = part[: items[split]] if items else part
            questions.write_text("".join(json.dumps(ask(fact, facts)) + "\n" for fact in asked))
            task = TASK.format(name=name, tag=f"{prefix}_{split}", questions=json.dumps(str(questions)))
            (folder / f"{name}.yaml").write_text(task)


def main() -> None:
    for topic, relations in RELATIONS.items():
        facts = read_facts(topic)
        print(topic, {split: len(part) for split, part in split_facts(facts).items()})
        for relation in range(len(relations)):
            of_relation = [fact for fact in facts if fact.relation == relation]
            example = ask(of_relation[len(of_relation) // 4], facts)
            print(f"  {len(of_relation):3d}  {example['question']} … {' / '.join(example['choices'])}")


if __name__ == "__main__":
    main()
