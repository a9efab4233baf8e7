"""Stand-ins for the leaderboard's data sets: local directories of the real names, a few made-up items of the real
schema.

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


# --- metabench ------------------------------------------------------------------------------------


def metabench_rows() -> dict[str, dict]:
    """One document of each metabench config: the item and, spread over its columns, the demonstrations."""

    def spread(prefix: str, shots: int, columns) -> dict:
        return {f"{prefix}_{name}_shot_{i}": value for i in range(1, shots + 1) for name, value in columns(i).items()}

    arc_shots = spread(
        "arc",
        25,
        lambda i: {
            k: arc(i)[v]
            for k, v in dict(question="question", answerKey="answerKey", choices="choices", idx="id").items()
        },
    )
    names = ("ctx_a", "ctx_b", "ctx", "endings", "label", "ind", "source_id", "split", "split_type")
    hellaswag_shots = spread(
        "hellaswag", 10, lambda i: {**{k: hellaswag(i)[k] for k in names}, "activity_labels": "Cooking"}
    )
    mmlu_shots = spread("mmlu", 5, lambda i: {"question": f"q{i}", "choices": list("wxyz"), "answers": i % 4, "ind": i})
    winogrande_shots = spread(
        "winogrande",
        5,
        lambda i: {"prompt": winogrande(i)["sentence"], "answer": "1", "option1": "Ann", "option2": "Bea", "idx": i},
    )
    gsm8k_shots = spread("gsm8k", 5, lambda i: {"prompt": gsm8k(i)["question"], "answer": gsm8k(i)["answer"], "idx": i})
    return {
        "ARC": lambda i: {**arc(i), **arc_shots, "alltwentyfiveshot_longprompt": ""},
        "HellaSwag": lambda i: {**hellaswag(i), **hellaswag_shots, "alltenshot_longprompt": ""},
        "MMLU": lambda i: {**mmlu(i, "anatomy"), **mmlu_shots, "allfiveshot_longprompt": ""},
        "TruthfulQA": lambda i: truthfulqa(i),
        "Winogrande": lambda i: {**winogrande(i), **winogrande_shots, "allfiveshot_longprompt": ""},
        "GSM8K": lambda i: {**gsm8k(i), **gsm8k_shots, "allfiveshot_longprompt": ""},
    }


def write_metabench(root: Path) -> Path:
    """HCAI/metabench under `root`: three items in each set."""
    rows = metabench_rows()
    configs = {
        name: {"primary": [make(i) for i in range(3)], "secondary": [make(10 + i) for i in range(3)]}
        for name, make in rows.items()
    }
    write_data_set(root, "HCAI/metabench", configs)
    return root


# --- leaderboard v2 -------------------------------------------------------------------------------


def write_leaderboard_v2(root: Path) -> Path:
    """The data sets of BBH, GPQA, MuSR and MMLU-Pro under `root` (MATH and IFEval need packages that are not
    pinned)."""
    import lm_eval.tasks

    parts = {}
    for path in (Path(lm_eval.tasks.__file__).parent / "leaderboard" / "bbh_mc").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if "dataset_name" in config:
            choices = [str(choice) for choice in config["doc_to_choice"]]
            parts[config["dataset_name"]] = [
                {"input": f"Puzzle {i}", "target": choices[i % len(choices)]} for i in range(3)
            ]
    write_data_set(root, "SaylorTwift/bbh", {name: {"test": rows} for name, rows in parts.items()})
    answers = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)} | {"Correct Answer": "right"}
    gpqa = [{"Question": f"Why {i}?", **answers} for i in range(3)]
    write_data_set(
        root, "Idavidrein/gpqa", {f"gpqa_{part}": {"train": gpqa} for part in ("main", "diamond", "extended")}
    )
    musr = {
        split: [
            {
                "narrative": "Once.",
                "question": f"Who {i}?",
                "choices": str([f"{split} {c}" for c in range(count)]),
                "answer_index": i % count,
                "answer_choice": f"{split} {i % count}",
            }
            for i in range(3)
        ]
        for split, count in (("murder_mysteries", 2), ("object_placements", 5), ("team_allocation", 3))
    }
    write_data_set(root, "TAUR-Lab/MuSR", {"default": musr})
    pro = [
        {
            "question_id": i,
            "question": f"Pick {i}",
            "options": [f"o{c}" for c in range(10)],
            "answer": "ABCDEFGHIJ"[i],
            "answer_index": i,
        }
        for i in range(8)
    ]
    write_data_set(root, "TIGER-Lab/MMLU-Pro", {"default": {"test": pro[:3], "validation": pro[3:]}})
    return root
