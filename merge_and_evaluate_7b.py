"""Merge models by a recipe, score the merged model, keep every figure: step 4 of the chain.

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

Which weight is best? Try some, choose on one set of tasks, report another; an interrupted sweep resumes
where it was, and each weight's scores stay in results_weight_<weight>.json:

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml --weights 0.6 0.9 1.2 \\
        --choose_on arc_challenge winogrande --report_on hellaswag mmlu truthfulqa_mc2 gsm8k

One weight per model, all combinations (two models in the recipe, 3 x 2 merges):

    python merge_and_evaluate_7b.py --recipe recipes/recipe.yml \\
        --weight_grid 0.6 0.9 1.2 --weight_grid 0.9 1.2

Score a model without merging (scores it got before by the same recipe are taken, not made again), and ask which of
several results is better: the differences on the same questions, a verdict in words, a plot:

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

from common import cli
from common.exits import run
from common.shards.checkpoint import open_checkpoint
from common.shards.places import refuse_existing, refuse_existing_file
from common.shards.verify import verify
from merge_and_evaluate.announcement import planned
from merge_and_evaluate.comparison import compare
from merge_and_evaluate.eval_recipes import check_device, read_eval_recipe
from merge_and_evaluate.mergekit_engine import TOKEN_KEYS
from merge_and_evaluate.merging import (
    ENGINES,
    REPORT_NAME,
    MergePlan,
    MergeSettings,
    already_merged,
    input_digests,
    memory_needed,
    merge,
    merge_identity,
    model_digest,
    origin,
    plan_merge,
)
from merge_and_evaluate.recipes import read_recipe, with_models, with_weights
from merge_and_evaluate.scoring import (
    Model,
    Scoring,
    check_chat_template,
    check_one_process,
    check_tokenizer,
    score_and_show,
    score_or_reuse,
)
from merge_and_evaluate.sweep import Sweep, plan_candidates, plan_scorings, planned_files, weight_choices
from merge_and_evaluate.sweep import run as run_sweep

DTYPES = ("auto", "float32", "bfloat16", "float16")
MERGE_DEFAULTS = {"recipe": "recipes/recipe.yml", "save_path": "./models/merged", "engine": "auto", "seed": 0}
EVAL_DEFAULTS = {"eval_recipe": "recipes/open_llm_leaderboard.yml", "output_path": "results.json"}


def add_everyday_flags(parser: argparse.ArgumentParser) -> None:
    """What is merged, what is scored, where it goes."""
    add = parser.add_argument_group("every day").add_argument
    add("--recipe", type=cli.path, metavar="FILE", help=f"merge recipe (default: {MERGE_DEFAULTS['recipe']})")
    add(
        "--save_path",
        type=cli.path_or_hub_id,
        metavar="DIR",
        help=f"the merged model; with --eval_only the one to score (default: {MERGE_DEFAULTS['save_path']})",
    )
    add(
        "--eval_recipe",
        type=cli.path,
        metavar="FILE",
        help=f"what `lm_eval run --config` takes; flags win (default: {EVAL_DEFAULTS['eval_recipe']})",
    )
    add(
        "--output_path",
        type=cli.path,
        metavar="FILE",
        help=f"the results; lm-eval's messages go to a .log beside them (default: {EVAL_DEFAULTS['output_path']})",
    )
    add("--name", metavar="TEXT", help="row name in tables (default: the recipe's file name without .yml)")
    add("--merge_only", action="store_true", help="merge, do not score")
    add("--eval_only", action="store_true", help="score the model in --save_path, do not merge")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:0, mps (default: the eval recipe's, else cuda if there)")
    add(
        "--batch_size",
        type=cli.batch_size,
        metavar="N",
        help="sequences scored at once, or auto (default: the eval recipe's, else 1)",
    )
    add("--overwrite", action="store_true", help="replace what is there once the new model and results are whole")
    add("--dry_run", action="store_true", help="check everything, print what would be done, and stop")


def add_merge_flags(parser: argparse.ArgumentParser) -> None:
    """Details of the merge."""
    add = parser.add_argument_group("the merge in detail").add_argument
    add("--base_model", type=cli.path_or_hub_id, metavar="DIR", help="this base instead of the recipe's")
    add(
        "--models",
        type=cli.path_or_hub_id,
        nargs="+",
        metavar="DIR",
        help="these models instead of the recipe's, in its order",
    )
    add(
        "--max_shard_size",
        type=cli.byte_size,
        metavar="SIZE",
        help="start a new safetensors file beyond this size (default: 5GB; 1GB where mergekit merges, which holds one)",
    )
    add(
        "--engine",
        choices=ENGINES,
        help="stream: at the speed of a copy, any architecture; mergekit: everything else it can do; auto: stream what "
        "streams, and say which it was (default: auto)",
    )
    add("--seed", type=int, metavar="N", help="for methods that draw at random: dare_*, della_* (default: 0)")


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Details of the scoring: each wins over the eval recipe."""
    add = parser.add_argument_group("the scoring in detail").add_argument
    add(
        "--dtype",
        choices=DTYPES,
        help="score in this dtype (default: the model's; on a CPU float32 for float16 models)",
    )
    add(
        "--limit",
        type=cli.limit,
        metavar="N",
        help="only the first N items of each task, or a share below 1: a quick look",
    )
    add(
        "--model_args",
        metavar="K=V,…",
        help="more arguments of lm-eval's model: max_length=2048,attn_implementation=sdpa",
    )


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Several values of the weight (the method's lambda)."""
    add = parser.add_argument_group("sweep over the weight").add_argument
    add(
        "--weights",
        nargs="+",
        type=cli.finite_float,
        metavar="W",
        help="weights to try, the same for every model: 0.6 0.9 1.2",
    )
    add(
        "--weight_grid",
        nargs="+",
        type=cli.finite_float,
        action="append",
        metavar="W",
        help="weights to try for one model; repeat per model, in the recipe's order: all combinations",
    )
    add(
        "--choose_on",
        nargs="+",
        metavar="TASK",
        help="choose by the average over these tasks or groups; report the eval recipe's other tasks. A task keeps "
        "the shots that the recipe gives it",
    )
    add("--report_on", nargs="+", metavar="TASK", help="with --choose_on: report these tasks or groups")
    add(
        "--keep_models",
        action="store_true",
        help="keep every model, as <save_path>_weight_<weight>; the best is in --save_path anyhow",
    )


def add_compare_flags(parser: argparse.ArgumentParser) -> None:
    """Results files side by side; nothing is merged or scored."""
    add = parser.add_argument_group("compare results").add_argument
    add(
        "--compare",
        type=cli.path,
        nargs="+",
        metavar="FILE",
        help="print these results files as one table, then each row's difference from one of them, item by item, with "
        "a verdict; draw both",
    )
    add(
        "--against",
        metavar="ROW",
        help="the row that the others are compared with, by its name or file (default: the first)",
    )
    add("--plot_path", type=cli.path, metavar="FILE", help="the picture of --compare (default: results_comparison.png)")
    cli.add_verify_flag(parser.add_argument_group("look at what was written"))


def check_combination(parser: argparse.ArgumentParser, given: set[str]) -> None:
    """Usage error for flags that contradict or do not use one another."""
    sweep = {"weights", "weight_grid", "choose_on", "report_on", "keep_models"}
    scoring = {"dtype", "limit", "model_args"}
    refusals = [
        ("verify", given - {"verify"}),
        ("compare", given - {"compare", "plot_path", "against"}),
        (
            "eval_only",
            given & ({"merge_only", "recipe", "base_model", "models", "max_shard_size", "seed", "engine"} | sweep),
        ),
        ("merge_only", given & ({"eval_recipe", "output_path", "batch_size", "name"} | scoring | sweep)),
        ("weights", given & {"weight_grid"}),
    ]
    for flag, clash in refusals:
        if flag in given and clash:
            parser.error(f"--{flag} does not go with {', '.join('--' + name for name in sorted(clash))}")
    for flag, needed in [
        ("choose_on", {"weights", "weight_grid"}),
        ("keep_models", {"weights", "weight_grid"}),
        ("report_on", {"choose_on"}),
        ("plot_path", {"compare"}),
        ("against", {"compare"}),
    ]:
        if flag in given and not given & needed:
            parser.error(f"--{flag} needs {' or '.join('--' + name for name in sorted(needed, reverse=True))}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_everyday_flags(parser)
    add_sweep_flags(parser)
    add_compare_flags(parser)
    add_merge_flags(parser)
    add_scoring_flags(parser)
    args = parser.parse_args(argv)
    check_combination(parser, {name for name, value in vars(args).items() if value not in (None, False)})
    for name, value in {**MERGE_DEFAULTS, **EVAL_DEFAULTS, "plot_path": "results_comparison.png"}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def print_merge(merge_plan: MergePlan, settings: MergeSettings, merges: int) -> None:
    """What --dry_run says of the merge: what is read and written, and what it takes."""
    several = f", {merges} weights" if merges > 1 else ""
    print(f"merge   {merge_plan.recipe.path}: {merge_plan.recipe.config['merge_method']}{several}")
    print(f"engine  {engine_line(merge_plan)}")
    for checkpoint in merge_plan.checkpoints:
        print(f"reads   {checkpoint.nbytes / 1e9:8.3f} GB  {checkpoint.label}")
    print(f"writes  {merge_plan.nbytes / 1e9:8.3f} GB  {merge_plan.save_path}")
    print(f"disk    {merge_plan.nbytes * min(merges, 2) / 1e9:8.3f} GB  to be free; more with --keep_models")
    print(f"memory  {memory_needed(merge_plan, settings) / 1e9:8.3f} GB  for the merge, about")


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


def merged_model(merge_plan: MergePlan, settings: MergeSettings, name: str, overwrite: bool) -> Model:
    """Merge, unless the output holds this merge from an earlier run that did not get to scoring."""
    if not (merge_plan.save_path / REPORT_NAME).is_file():
        refuse_existing(merge_plan.save_path, overwrite)
    digests = input_digests(merge_plan)
    identity = merge_identity(merge_plan.recipe, digests, settings)
    if overwrite or not already_merged(merge_plan.save_path, identity):
        print(f"engine: {engine_line(merge_plan)}", flush=True)
        if merge(merge_plan, digests, settings, overwrite):
            print(f"wrote {merge_plan.save_path} ({merge_plan.nbytes / 1e9:.3f} GB)")
    else:
        print(f"{merge_plan.save_path} holds this merge already")
    return Model(str(merge_plan.save_path), name, identity, origin(merge_plan.recipe, digests, settings))


def eval_flags(args: argparse.Namespace) -> dict:
    """The flags that win over the eval recipe."""
    return {name: getattr(args, name) for name in ("device", "batch_size", "dtype", "limit", "model_args")}


# In each of the two below, recipes, headers and tasks come first: every refusal, before anything is written.


def evaluate_only(args: argparse.Namespace) -> None:
    """Score the model in --save_path."""
    eval_recipe = read_eval_recipe(str(args.eval_recipe), **eval_flags(args))
    checkpoint, output_path = open_checkpoint(args.save_path), Path(args.output_path)
    scoring, _ = plan_scorings(eval_recipe, None, None)
    check_tokenizer(eval_recipe, [checkpoint])
    check_chat_template(eval_recipe, [checkpoint])
    place = str(Path(args.save_path)) if Path(args.save_path).is_dir() else str(checkpoint.path)
    name = args.name or Path(args.save_path).name
    if args.dry_run:
        print(f"model   {place}")
        print_scoring(scoring, None, [output_path])
        return
    score_or_reuse(scoring, Model(place, name, model_digest(checkpoint), {}), output_path, args.overwrite)


def merge_and_evaluate(args: argparse.Namespace) -> None:
    """Merge by --recipe, for every weight that is asked for, and score what comes out."""
    check_device(args.device)
    settings = MergeSettings(args.max_shard_size, args.device or "cpu", args.seed, args.engine)
    recipe = with_models(read_recipe(str(args.recipe)), args.base_model, args.models)
    merge_plan = plan_merge(recipe, args.save_path, settings)
    choices = weight_choices(args.weights, args.weight_grid)
    trials = {weights: with_weights(merge_plan.recipe, weights) for weights in choices}
    name, output_path = args.name or merge_plan.recipe.name, Path(args.output_path)
    if merge_plan.reason or not args.merge_only:
        check_one_process()
    if not args.merge_only:
        eval_recipe = read_eval_recipe(str(args.eval_recipe), **eval_flags(args))
        choosing, reporting = plan_scorings(eval_recipe, args.choose_on, args.report_on)
        check_tokenizer(eval_recipe, merge_plan.checkpoints)
        made = any(merge_plan.recipe.config.get(key) for key in TOKEN_KEYS)
        check_chat_template(eval_recipe, merge_plan.checkpoints, made_by_recipe=made)
    if not args.merge_only and not trials:
        refuse_existing_file(output_path, args.overwrite)
    if args.dry_run:
        print_merge(merge_plan, settings, max(len(trials), 1))
        if not args.merge_only:
            print_scoring(choosing, reporting, planned_files(output_path, choices) if trials else [output_path])
        return

    if trials:
        digests = input_digests(merge_plan)
        candidates = plan_candidates(merge_plan, trials, digests, settings, output_path)
        sweep = Sweep(name, candidates, choosing, reporting, merge_plan.save_path, output_path)
        run_sweep(sweep, digests, settings, args.keep_models, args.overwrite)
        return
    model = merged_model(merge_plan, settings, name, args.overwrite)
    if not args.merge_only:
        score_and_show(choosing, model, output_path)


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
