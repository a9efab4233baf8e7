"""Merge models by a recipe, score the merged model, save every score: step 4 of the chain.

    merged = base + sum of weight_i * (model_i - base)        (task_arithmetic; the recipe says the method)

    python merge_and_evaluate_7b.py \\
        --recipe recipes/recipe.yml --save_path ./models/merged \\
        --eval_recipe recipes/open_llm_leaderboard.yml --output_path results.json \\
        --device cuda:0 --batch_size 8

Both recipes are the tools' own: the same files work with `mergekit-yaml` and `lm_eval run --config`. What streams
(--engine) is merged tensor by tensor in little memory, and resumes if it is stopped; everything else is left to
mergekit, which holds one output shard in memory: lower --max_shard_size for less. The model appears under --save_path
once it is complete and finite, with merge_report.json (a hash of every tensor) and a model card beside it. results.json
is lm-eval's own document plus `summary` (each task's leaderboard metric, its standard error, the average), `items`
(every question's score) and `provenance` (what was merged and scored, and how).

Which weight is best? Try some, choose on one set of tasks, report another. Candidates are merged into one model in
memory where that can be, and only the best is written; an interrupted sweep resumes where it was, and each weight's
scores stay in results_weight_<weight>.json:

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml --weights 0.6 0.9 1.2 \\
        --choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k

The same in fewer GPU hours: a race scores all weights on the same random questions, in growing batches, and drops
those that cannot be better than the leader by more than half a point:

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml --weights 0.6 0.9 1.2 --race 0.5 \\
        --choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k

Several recipes race in the same way, each with its own weights or with each of --weights; the winner alone is written:

    python merge_and_evaluate_7b.py --recipe recipes/cabs.yml recipes/magnitude.yml recipes/random.yml --race \\
        --weights 0.6 0.9 1.2 --choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k

Or search for a weight per model (CMA-ES, as in CABS+):

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml --search cma --evaluations 40 --choose_by gold \\
        --choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k

One weight per model, all combinations (two models in the recipe, 3 x 2 merges):

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml \\
        --weight_grid 0.6 0.9 1.2 --weight_grid 0.9 1.2

Score a model without merging, and ask which of several results is better: the differences on the same questions, a
verdict in words, a plot. Scores already made for the same weights by the same recipe are reused:

    python merge_and_evaluate_7b.py --eval_only \\
        --save_path ./models/WestSeverus-7B-DPO-v2 --output_path west.json
    python merge_and_evaluate_7b.py --compare west.json results.json --against west.json

Are these files still what was written? Every tensor against its recorded hash:

    python merge_and_evaluate_7b.py --verify models/merged models/pruned_vector_westseverus
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from common.exits import run
from common.shards.places import refuse_existing_file, refuse_existing_outputs
from common.shards.processes import group
from common.shards.remote import describe_checkpoint, fetch
from common.shards.verify import verify
from merge_and_evaluate.announcement import planned
from merge_and_evaluate.candidates import Making
from merge_and_evaluate.choices import weight_choices
from merge_and_evaluate.choosing import plan_scorings
from merge_and_evaluate.comparison import compare
from merge_and_evaluate.eval_recipes import check_device, read_eval_recipe
from merge_and_evaluate.flags import parsed
from merge_and_evaluate.loadable import check_loadable
from merge_and_evaluate.mergekit_engine import TOKEN_KEYS
from merge_and_evaluate.merging import (
    REPORT_NAME,
    MergePlan,
    MergeSettings,
    already_merged,
    check_seed,
    fetched,
    input_digests,
    memory_needed,
    merge,
    merge_identity,
    model_digest,
    origin,
    plan_merge,
)
from merge_and_evaluate.recipes import read_recipe, with_models
from merge_and_evaluate.scoring import (
    Model,
    Scoring,
    check_chat_template,
    check_one_process,
    check_results,
    check_tokenizer,
    score_or_reuse,
)
from merge_and_evaluate.sweep import Sweep
from merge_and_evaluate.which_weight import (
    Question,
    answer,
    check_before_download,
    check_names,
    check_places_of_results,
    cost_line,
    files_of,
    on,
    plan_choices,
    priced,
    print_memory,
)


def parse_args(argv=None) -> argparse.Namespace:
    return parsed(__doc__, argv)


def print_merges(merge_plans: list[MergePlan], settings: MergeSettings, candidates: int, models_on_disk: int) -> None:
    """What --dry_run says of the merges: what is read and written, and what it takes."""
    each = f", {candidates // len(merge_plans)} weights" if candidates > len(merge_plans) else ""
    for merge_plan in merge_plans:
        print(f"merge   {merge_plan.recipe.path}: {merge_plan.recipe.config['merge_method']}{each}")
        print(f"engine  {engine_line(merge_plan)}")
    for checkpoint in {c.path: c for merge_plan in merge_plans for c in merge_plan.checkpoints}.values():
        later = ", to be downloaded" if checkpoint.is_remote else ""
        print(f"reads   {checkpoint.nbytes / 1e9:8.3f} GB  {checkpoint.label}{later}")
    nbytes = max(merge_plan.nbytes for merge_plan in merge_plans)
    print(f"writes  {nbytes / 1e9:8.3f} GB  {merge_plans[0].save_path}")
    print(f"disk    {nbytes * models_on_disk / 1e9:8.3f} GB  needed; more with --keep_models")
    memory = max(memory_needed(merge_plan, settings) for merge_plan in merge_plans)
    print(f"memory  {memory / 1e9:8.3f} GB  for the merge, about")


def engine_line(merge_plan: MergePlan) -> str:
    """Which engine merges and, if it is mergekit, why: "mergekit, because slices: cuts …"."""
    return "stream" if merge_plan.reason is None else f"mergekit, because {merge_plan.reason}"


def print_scoring(choosing: Scoring, reporting: Scoring | None, files: list[Path]) -> None:
    """What --dry_run says of the scoring: which tasks choose and which report, with which shots, and every file."""
    recipe = choosing.recipe
    given, limit = recipe.config.get("num_fewshot"), recipe.config.get("limit")
    part = f" (limit {limit:g})" if limit is not None else ""
    print(f"score   {recipe.path}: {', '.join(recipe.tasks)}{part}")
    if reporting:
        print(f"choose  on {planned(choosing.tasks, given)}")
        print(f"report  on {planned(reporting.tasks, given)}")
    else:
        print(f"tasks   {planned(choosing.tasks, given)}")
    for file in files:
        print(f"writes  {file}")


def check_results_of(merge_plan: MergePlan, settings: MergeSettings, choosing: Scoring, path: Path, overwrite) -> None:
    """Refuse what lies at `path` before the merge, unless it may be replaced or is what this very command wrote; while
    models are on the Hub that cannot be told."""
    if merge_plan.is_remote:
        refuse_existing_file(path, overwrite)
        return
    identity = merge_identity(merge_plan.recipe, input_digests(merge_plan), settings)
    check_results(choosing, Model(str(merge_plan.save_path), "", identity, {}), path, overwrite)


def merged_model(merge_plan: MergePlan, settings: MergeSettings, name: str, overwrite: bool) -> Model:
    """Merge, unless the output holds this merge from an earlier run."""
    digests = input_digests(merge_plan)
    identity = merge_identity(merge_plan.recipe, digests, settings)
    is_there = not overwrite and already_merged(merge_plan.save_path, identity)
    if group().is_main:  # under torchrun one process speaks
        how = f"engine: {engine_line(merge_plan)}"
        print(f"{merge_plan.save_path} holds this merge already" if is_there else how, flush=True)
    if not is_there and merge(merge_plan, digests, settings, overwrite):
        print(f"wrote {merge_plan.save_path} ({merge_plan.nbytes / 1e9:.3f} GB)")
    return Model(str(merge_plan.save_path), name, identity, origin(merge_plan.recipe, digests, settings))


def eval_flags(args: argparse.Namespace) -> dict:
    """The flags that win over the eval recipe."""
    return {name: getattr(args, name) for name in ("device", "batch_size", "dtype", "limit", "model_args")}


# In each of the two below, recipes, headers and tasks come first: every refusal, before anything is written.


def evaluate_only(args: argparse.Namespace) -> None:
    """Score the model in --save_path."""
    eval_recipe = read_eval_recipe(str(args.eval_recipe), **eval_flags(args))
    checkpoint, output_path = describe_checkpoint(args.save_path), Path(args.output_path)
    scoring, _ = plan_scorings(eval_recipe, None, None)
    check_tokenizer(eval_recipe, [checkpoint])
    check_chat_template(eval_recipe, [checkpoint])
    check_loadable(eval_recipe, [checkpoint], is_merged=False)
    place = str(Path(args.save_path)) if Path(args.save_path).is_dir() else str(checkpoint.path)
    name = args.name or Path(args.save_path).name
    if args.dry_run:
        print(f"model   {place}{' (to be downloaded)' * checkpoint.is_remote}")
        print_scoring(scoring, None, [output_path])
        return
    if checkpoint.is_remote:
        refuse_existing_file(output_path, args.overwrite)
        checkpoint = fetch(checkpoint)
    score_or_reuse(scoring, Model(place, name, model_digest(checkpoint), {}), output_path, args.overwrite)


def question_of(args: argparse.Namespace) -> Question | None:
    """What the flags ask about weights and recipes; None where there is one recipe, whose own weights are taken."""
    weights = tuple(weight_choices(args.weights, args.weight_grid))
    if not weights and not args.search and len(args.recipe) == 1:
        return None
    return Question(weights, args.choose_by, args.seed or 0, args.race, args.evaluations, args.layer_groups)


def planned_merges(args: argparse.Namespace, settings: MergeSettings) -> list[MergePlan]:
    """The merge of every recipe, from headers."""
    check_names([str(path) for path in args.recipe])
    recipes = [with_models(read_recipe(str(path)), args.base_model, args.models) for path in args.recipe]
    if args.seed is not None and args.race is None and not args.search:
        check_seed(recipes)
    return [plan_merge(recipe, args.save_path, settings) for recipe in recipes]


def scorings(args: argparse.Namespace, merge_plans: list[MergePlan]) -> tuple[Scoring, Scoring | None]:
    """What decides and what is reported, checked against the models that will be scored."""
    eval_recipe = read_eval_recipe(str(args.eval_recipe), **eval_flags(args))
    found = plan_scorings(eval_recipe, args.choose_on, args.report_on)
    for merge_plan in merge_plans:
        check_tokenizer(eval_recipe, merge_plan.checkpoints)
        made = any(merge_plan.recipe.config.get(key) for key in TOKEN_KEYS)
        check_chat_template(eval_recipe, merge_plan.checkpoints, made_by_recipe=made)
        check_loadable(eval_recipe, merge_plan.checkpoints, is_merged=True, makes_tokenizer=made)
    return found


def merge_and_evaluate(args: argparse.Namespace) -> None:
    """Merge by --recipe, for every recipe and weight that is asked for, and score what comes out."""
    check_device(args.device)
    if not args.dry_run and not (Path(args.save_path) / REPORT_NAME).is_file():  # is it this merge? Its inputs will say
        refuse_existing_outputs([Path(args.save_path)], args.overwrite)
    settings = MergeSettings(args.max_shard_size, args.device or "cpu", args.seed or 0, args.engine, tuple(args.skip))
    merge_plans = planned_merges(args, settings)
    merge_plan, output_path = merge_plans[0], Path(args.output_path)
    question = question_of(args)
    asked = plan_choices(question, merge_plans) if question else None
    if not args.merge_only:
        check_one_process(
            "merge with --merge_only, then score with `accelerate launch merge_and_evaluate_7b.py --eval_only …`"
        )
        choosing, reporting = scorings(args, merge_plans)
    elif merge_plan.reason:
        check_one_process(f"mergekit merges this recipe ({merge_plan.reason}); start it without torchrun")
    if not args.merge_only and not asked:
        check_results_of(merge_plan, settings, choosing, output_path, args.overwrite)
    if asked:
        check_places_of_results(asked, merge_plan.save_path, output_path)
        asked = priced(asked, choosing, settings, None if args.dry_run else output_path.with_suffix(".log"))
    if args.dry_run:
        candidates, models_on_disk = (asked.candidates, asked.models_on_disk) if asked else (1, 1)
        print_merges(merge_plans, settings, candidates, models_on_disk)
        if asked:
            print_memory(merge_plans, settings, choosing, args.keep_models)
            print(f"cost    {cost_line(asked)}")
        if not args.merge_only:
            print_scoring(choosing, reporting, files_of(asked, output_path) if asked else [output_path])
        return

    if asked:
        making = Making(settings, args.keep_models, args.overwrite)
        name = args.name or ("" if len(merge_plans) > 1 else merge_plan.recipe.name)
        sweep = Sweep(name, (), choosing, reporting, merge_plan.save_path, output_path)
        if any(plan.is_remote for plan in merge_plans):
            check_before_download(asked, sweep, making)
            asked = on(asked, [fetched(plan, settings, args.overwrite) for plan in merge_plans])
        answer(asked, sweep, making)
        return
    merge_plan = fetched(merge_plan, settings, args.overwrite)
    model = merged_model(merge_plan, settings, args.name or merge_plan.recipe.name, args.overwrite)
    if not args.merge_only:
        score_or_reuse(choosing, model, output_path, args.overwrite)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.compare:
        compare([str(path) for path in args.compare], Path(args.plot_path), args.against)
    elif args.verify:
        verify(args.verify)
    elif args.eval_only:
        evaluate_only(args)
    else:
        merge_and_evaluate(args)


if __name__ == "__main__":
    run(main)
