"""The demo's facts, questions, tasks and models, on their own (the whole demo is `make demo`)."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

DEMO = Path(__file__).resolve().parent.parent / "examples" / "tiny_mistral"
sys.path.insert(0, str(DEMO))
import make_models  # noqa: E402
import questions  # noqa: E402
import seeds  # noqa: E402

TOPICS = tuple(questions.RELATIONS)


@pytest.mark.parametrize("topic", TOPICS)
def test_every_question_has_one_right_answer(topic):
    facts = questions.read_facts(topic)
    assert len({fact.prompt for fact in facts}) == len(facts)
    for fact in facts:
        question = questions.ask(fact, facts)
        assert len(set(question["choices"])) == questions.CHOICES
        assert question["choices"][question["label"]] == fact.answer
        assert question == questions.ask(fact, facts)


@pytest.mark.parametrize("topic", TOPICS)
def test_splits_share_no_question_and_the_tested_one_is_large(topic):
    parts = questions.split_facts(questions.read_facts(topic))
    assert not set(parts["val"]) & set(parts["test"])
    assert set(parts["val"]) | set(parts["test"]) == set(questions.read_facts(topic))
    assert len(parts["test"]) >= 500


def test_elements_follow_the_periodic_table():
    with open(questions.FACTS / "elements.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["number"]) for row in rows] == list(range(1, 119))
    assert [row["element"] for row in rows if row["group"] == "18"] == (
        ["helium", "neon", "argon", "krypton", "xenon", "radon", "oganesson"]
    )
    periods = [int(row["period"]) for row in rows]
    assert [periods.count(period) for period in range(1, 8)] == [2, 8, 8, 18, 18, 32, 32]


@pytest.mark.slow
def test_tasks_are_found_by_lm_eval_from_any_directory(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions.write_tasks(tmp_path / "a tasks folder")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    manager = TaskManager(include_path=str(tmp_path / "a tasks folder"), include_defaults=False)
    assert set(manager.all_tags) == {"tiny_val", "tiny_test"}
    tasks = manager.load(["tiny_val"])["tasks"]
    for topic in TOPICS:
        facts = questions.split_facts(questions.read_facts(topic))["val"]
        asked = [doc["question"] for doc in tasks[f"tiny_{topic}_val"].test_docs()]
        assert asked == [fact.prompt for fact in facts]


def test_tokenizer_gives_back_every_sentence_with_digits_apart():
    sentences = [fact.sentence for topic in TOPICS for fact in questions.read_facts(topic)]
    tokenizer = make_models.train_tokenizer(sentences)
    for sentence in sentences:
        assert tokenizer.decode(tokenizer(sentence)["input_ids"], skip_special_tokens=True) == sentence
    assert tokenizer.tokenize("is 118.")[-4:] == ["1", "1", "8", "."]


@pytest.mark.slow
def test_models_are_sharded_checkpoints_that_share_names_shapes_and_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_models.make_models(tmp_path, seed=0, base_epochs=1, epochs=1)
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", *TOPICS)}
    shapes = {name: {k: v.shape for k, v in model.state_dict().items()} for name, model in models.items()}
    assert shapes["base"] == shapes["countries"] == shapes["elements"]
    assert {str(model.dtype) for model in models.values()} == {"torch.bfloat16"}
    for name in models:
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        assert AutoTokenizer.from_pretrained(tmp_path / name)("The capital")["input_ids"][0] == 0


@pytest.mark.slow
def test_killed_training_leaves_no_process_behind(tmp_path):
    """However it is killed: its workers, which wait for the base, watch for that and end."""
    command = [sys.executable, str(DEMO / "make_models.py"), "--save_path", str(tmp_path)]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = []
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(family) < len(TOPICS):
            time.sleep(0.1)
            family = [child for child in psutil.Process(training.pid).children() if "spawn_main" in child.cmdline()[-2]]
    finally:
        training.kill()
        training.wait()
    assert len(family) == len(TOPICS)
    gone, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()
    assert not alive


def test_seeds_are_averaged_and_rows_compared_seed_by_seed(tmp_path):
    """Two seeds by hand: 60 and 70 of task arithmetic, 58 and 69 of CABS: 63.5 ± 5.5, and -1.5 ± 0.5 behind."""
    for seed, (plain, cabs) in enumerate([(60, 58), (70, 69)]):
        (tmp_path / str(seed)).mkdir()
        for file, name, score, chosen in (
            ("results_task_arithmetic", "task arithmetic", plain, {}),
            ("results", "CABS", cabs, {"weights": [1.2], "chosen": {"items": 30, "items_of_all": 120}}),
        ):
            summary = {"name": name, "tasks": {"x": {"value": score / 100}}, "average": score / 100, **chosen}
            (tmp_path / str(seed) / f"{file}.json").write_text(json.dumps({"summary": summary}))
    runs = [seeds.read_rows(tmp_path / seed) for seed in "01"]
    assert seeds.table(runs).splitlines() == [
        "|  | λ | x | average | minus task arithmetic | items to choose λ |",
        "|---|---|---|---|---|---|",
        "| task arithmetic |  | 65.00 ± 5.00 | 65.00 ± 5.00 |  |  |",
        "| CABS | 1.2, 1.2 | 63.50 ± 5.50 | 63.50 ± 5.50 | -1.50 ± 0.50 | 25 % |",
    ]
    assert "minus" not in seeds.table(runs[:1]) and "25% of the items" in seeds.saved(runs)


@pytest.mark.parametrize("recipe", sorted((DEMO / "recipes").glob("*.yml")), ids=lambda path: path.stem)
def test_recipes_load_in_their_tools_and_are_used_by_the_demo(recipe):
    from mergekit.config import MergeConfiguration

    content = yaml.safe_load(recipe.read_text())
    if recipe.stem == "evaluate":
        assert content["tasks"] == ["tiny_test"]
    else:
        config = MergeConfiguration.model_validate(content)
        assert len(config.models) == 2
    assert re.search(rf"\b{recipe.stem}\b", (DEMO / "run.sh").read_text())
