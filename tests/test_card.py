"""The model card: scores of several tasks side by side, what was pruned before the merge, what a user wrote into it."""

import json
from pathlib import Path

import pytest
from recipes_and_models import merge_and_score, write_yaml

import merge_and_evaluate_7b
import prune_task_vector_7b
from merge_and_evaluate.card import with_scores
from merge_and_evaluate.results import way_of_asking

CARD = "---\nlicense: mit\n---\n\n# merged\n\nMerged.\n\n## Recipe\n\n```yaml\na: b\n```\n\n## Command\n"


def test_scores_of_other_tasks_stand_beside_and_the_same_ones_are_replaced():
    one = with_scores(CARD, "arc", "| arc |\n|---|\n| 1 |")
    assert one == CARD.replace("\n## Recipe", "\n## Scores\n\n### arc\n\n| arc |\n|---|\n| 1 |\n\n## Recipe")
    both = with_scores(one, "wiki, c4", "| wiki |\n|---|\n| 2 |")
    again = with_scores(both, "arc", "| arc |\n|---|\n| 3 |")
    assert "| 2 |" in both and "| 1 |" in both
    assert again == both.replace("| 1 |", "| 3 |")
    assert again.endswith(CARD[CARD.index("\n## Recipe") :])


def test_a_card_that_a_user_rewrote_keeps_what_it_says():
    own = "# My model\n\nwords\n"
    found = with_scores(own, "arc", "| arc |\n|---|\n| 1 |")
    assert found == own + "\n## Scores\n\n### arc\n\n| arc |\n|---|\n| 1 |\n"
    assert with_scores(found + "\n## Thanks\n", "arc", "| arc |\n|---|\n| 3 |").endswith("| 3 |\n\n## Thanks\n")


def test_the_same_tasks_asked_otherwise_stand_beside():
    """A quick look at twenty items, other shots, a chat template: none of them replaces the scores on all items."""

    def title(shots: int = 5, limit=None, template=None) -> str:
        summary = {"tasks": {"arc": {"num_fewshot": shots}, "wino": {"num_fewshot": shots}}}
        document = {"provenance": {"tasks": ["arc", "wino"], "limit": limit}, "summary": summary}
        return way_of_asking({**document, "chat_template_sha": template})

    titles = [title(), title(limit=20), title(shots=0), title(template="abc"), title(shots=0, limit=0.5)]
    assert titles == [
        "arc, wino (5-shot)",
        "arc, wino (5-shot, limit 20)",
        "arc, wino (0-shot)",
        "arc, wino (5-shot, chat template)",
        "arc, wino (0-shot, limit 0.5)",
    ]
    text = CARD
    for number, name in enumerate(titles):
        text = with_scores(text, name, f"| arc |\n|---|\n| {number} |")
    assert [line for line in text.splitlines() if line.startswith("### ")] == [f"### {name}" for name in titles]
    assert with_scores(text, titles[0], "| arc |\n|---|\n| 9 |") == text.replace("| 0 |", "| 9 |")


@pytest.mark.slow
def test_scoring_by_a_second_recipe_keeps_the_first_ones_scores(here):
    merge_and_score()
    card = Path("merged/README.md")
    card.write_text(card.read_text().replace("\n## Recipe\n", "\nA line of the user's.\n\n## Recipe\n"))
    first = card.read_text()
    write_yaml(here / "other.yml", {"model": "hf", "include_path": "./tasks", "tasks": ["shades"], "device": "cpu"})
    flags = ["--eval_recipe", "other.yml", "--output_path", "other.json", "--limit", "2"]
    merge_and_evaluate_7b.main(["--eval_only", "--save_path", "merged", *flags])
    text = card.read_text()
    tables = [line for line in first.splitlines() if line.startswith(("### ", "| "))]
    assert tables and all(line in text for line in tables)
    assert "\n### shades (0-shot, limit 2)\n" in text
    assert "| merged (limit 2) | metric | shots | items | score |" in text
    assert "A line of the user's." in text


@pytest.mark.parametrize("engine", ["stream", pytest.param("mergekit", marks=pytest.mark.slow)])
def test_the_card_of_a_merge_of_pruned_models_says_how_they_were_pruned(here, engine):
    import extract_task_vector_7b

    for name in ("wild", "west"):
        paths = ["--finetuned_model_path", name, "--base_model_path", "base", "--save_path", f"vector_{name}"]
        extract_task_vector_7b.main(paths)
    vectors = ["--task_vector_path1", "vector_wild", "--task_vector_path2", "vector_west"]
    saves = ["--save_directory1", "pruned_wild", "--save_directory2", "pruned_west"]
    prune_task_vector_7b.main([*vectors, *saves, "--n", "1", "--m", "4"])
    models = ["--base_model", "base", "--models", "pruned_wild", "pruned_west"]
    flags = ["--recipe", "recipe.yml", *models, "--merge_only", "--save_path", "out", "--engine", engine]
    merge_and_evaluate_7b.main(flags)
    text = Path("out/README.md").read_text()
    report = json.loads(Path("pruned_west/prune_report.json").read_text())
    share = f"{100 * report['totals']['l2_share']:.1f} %"
    (line,) = [line for line in text.splitlines() if line.startswith("| `./pruned_west`")]
    assert share in line and "| 0.00 % |" in line
    assert "- `./pruned_west`: n:m, 1 of every 4, conflict-aware, number 2 of 2" in text
