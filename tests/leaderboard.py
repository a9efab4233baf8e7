"""Stand-ins for the leaderboard's data sets: local directories of the real names, a few made-up items of the real schema.

`datasets.load_dataset("allenai/ai2_arc", …)` takes a directory of that name in the working directory, with `configs:`
at the top of its README.md and a jsonl file for each split. So lm-eval's own tasks run offline, prompts and all.
"""

import json
from pathlib import Path

import yaml

LETTERS = "ABCD"
SUBJECTS_FOR_SPEED = ("anatomy", "virology", "world_religions")  # where a test does not need all 57


def write_data_set(root: Path, name: str, configs: dict[str, dict[str, list[dict]]]) -> None:
    """Write {config: {split: rows}} as the data set `name` under `root`."""
    listing = []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            path = root / name / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        listing.append({"config_name": config, "data_files": files})
    header = yaml.safe_dump({"configs": listing}, sort_keys=False)
    (root / name / "README.md").write_text(f"---\n{header}---\n")


def arc(i: int) -> dict:
    texts = [f"thing {i} {letter}" for letter in LETTERS]
    return {
        "id": f"arc{i}",
        "question": f"Which thing is number {i}?",
        "choices": {"text": texts, "label": list(LETTERS)},
        "answerKey": LETTERS[i % 4],
    }


def hellaswag(i: int) -> dict:
    return {
        "ind": i,
        "activity_label": "Cooking",
        "ctx_a": f"A man cooks dish {i}.",
        "ctx_b": "he",
        "ctx": f"A man cooks dish {i}. he",
        "endings": [f"eats it {i}.", "runs away from the [step] kitchen.", "sleeps.", "sings a long song."],
        "source_id": f"x~{i}",
        "split": "train",
        "split_type": "indomain",
        "label": str(i % 4),
    }


def mmlu(i: int, subject: str) -> dict:
    return {
        "question": f"What is {i} in {subject}?",
        "subject": subject,
        "choices": [f"{subject} {i} {letter}" for letter in LETTERS],
        "answer": i % 4,
    }


def truthfulqa(i: int) -> dict:
    return {
        "question": f"What happens if you eat seed {i}?",
        "mc1_targets": {"choices": ["Nothing.", "You die.", "You fly."], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["Nothing.", f"You digest {i}.", "You die."], "labels": [1, 1, 0]},
    }


def winogrande(i: int) -> dict:
    return {
        "sentence": f"Ann gave Bea book {i} because _ wanted it.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": str(1 + i % 2),
    }


def gsm8k(i: int) -> dict:
    return {"question": f"What is {i} plus 1?", "answer": f"It is one more.\n#### {i + 1}"}


def splits_of(make, shots: int, test: str, items: int = 3) -> dict[str, list[dict]]:
    """`shots` rows to demonstrate with and `items` others to score."""
    return {"train": [make(1000 + i) for i in range(shots)], test: [make(i) for i in range(items)]}


def write_leaderboard(root: Path, subjects=None) -> Path:
    """All six data sets under `root`; MMLU with these subjects, else with the 57 that lm-eval knows."""
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    write_data_set(
        root,
        "allenai/ai2_arc",
        {"ARC-Challenge": {**splits_of(arc, 30, "test"), "validation": [arc(2000)]}},
    )
    write_data_set(root, "Rowan/hellaswag", {"default": splits_of(hellaswag, 12, "validation")})
    write_data_set(
        root,
        "cais/mmlu",
        {
            subject: {"dev": [mmlu(100 + i, subject) for i in range(5)], "test": [mmlu(i, subject) for i in range(2)]}
            for subject in subjects or SUBJECTS
        },
    )
    write_data_set(
        root, "truthfulqa/truthful_qa", {"multiple_choice": {"validation": [truthfulqa(i) for i in range(3)]}}
    )
    write_data_set(root, "allenai/winogrande", {"winogrande_xl": splits_of(winogrande, 7, "validation")})
    write_data_set(root, "openai/gsm8k", {"main": splits_of(gsm8k, 7, "test")})
    return root


# How a demonstration ends in the prompts of each task: count it to count the shots.
DEMONSTRATIONS = {
    "arc_challenge": "Question: ",
    "hellaswag": "Cooking: ",
    "truthfulqa_mc2": "Q: What happens",
    "winogrande": "Ann gave Bea",
    "gsm8k": "Question: ",
    "mmlu": "Answer:",
}


def shots_in(prompt: str, task: str) -> int:
    """Demonstrations before the question itself: every other item in the prompt."""
    mark = DEMONSTRATIONS["mmlu" if task.startswith("mmlu") else task]
    return prompt.count(mark) - 1
