"""The flags of merge_and_evaluate_7b.py, in the groups of its --help, and which of them contradict each other."""

import argparse
from collections.abc import Callable

from common import cli
from merge_and_evaluate.merging import ENGINES

DTYPES = ("auto", "float32", "bfloat16", "float16")
MERGE_DEFAULTS = {"recipe": ["recipes/recipe.yml"], "save_path": "./models/merged", "engine": "auto"}
EVAL_DEFAULTS = {"eval_recipe": "recipes/open_llm_leaderboard.yml", "output_path": "results.json"}
CHOOSE_BY = ("score", "gold")
OTHER_DEFAULTS = {"plot_path": "results_comparison.png", "choose_by": "score", "skip": []}
SWEEPS = {"weights", "weight_grid", "search"}  # each tries several weights


def _everyday_flags(parser: argparse.ArgumentParser) -> None:
    """What is merged, what is scored, where it goes."""
    # Here and below defaults are only in the help: parsed() fills them in, once it has refused what does not go with
    # what was given.
    add = parser.add_argument_group("common options").add_argument
    add(
        "--recipe",
        type=cli.path,
        nargs="+",
        metavar="FILE",
        help="merge recipe; of several, with --race or without, the best is kept "
        f"(default: {MERGE_DEFAULTS['recipe'][0]})",
    )
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
        help=f"what `lm_eval run --config` takes; flags override it (default: {EVAL_DEFAULTS['eval_recipe']})",
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


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    """Details of the merge."""
    group = parser.add_argument_group("the merge in detail")
    add = group.add_argument
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
    cli.add_skip_flag(group)
    parser.set_defaults(skip=None)  # as of every flag here: whether it was given decides what it may stand beside
    add(
        "--seed",
        type=cli.seed,
        metavar="N",
        help="for merge methods that draw at random (dare_*, della*, arcee_fusion; random has its seed in the recipe), "
        "--race and --search (default: 0)",
    )


def _scoring_flags(parser: argparse.ArgumentParser) -> None:
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


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Several values of the weight (the method's lambda): all of them, a race among them, a search."""
    add = parser.add_argument_group("which weight is best").add_argument
    _tried_flags(add)
    _choosing_flags(add)
    _race_and_search_flags(add)


def _tried_flags(add: Callable) -> None:
    """Which weights are tried."""
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


def _choosing_flags(add: Callable) -> None:
    """What the best is chosen by, and what is kept of the others."""
    add(
        "--choose_on",
        nargs="+",
        metavar="TASK",
        help="choose by the average over these tasks or groups; report the eval recipe's other tasks (--report_on "
        "names them where a part of a group chooses). A task keeps the shots that the recipe gives it",
    )
    add("--report_on", nargs="+", metavar="TASK", help="with --choose_on: report these tasks or groups")
    add(
        "--keep_models",
        action="store_true",
        help="write and keep every model, as <save_path>_weight_<weight>; the best is in --save_path either way",
    )
    add(
        "--choose_by",
        choices=CHOOSE_BY,
        help="score: the tasks' metric; gold: the mean log-probability of the right answer, which needs fewer items "
        "(multiple choice only; default: score)",
    )


def _race_and_search_flags(add: Callable) -> None:
    """The same for fewer merges and fewer scored items: a race, a search."""
    # const, not default: --race alone means half a point, without it nothing races.
    add(
        "--race",
        nargs="?",
        const=0.5,
        type=cli.points,
        metavar="POINTS",
        help="with --weights, --weight_grid or several recipes: all on the same random items, in growing batches; one "
        "drops out once it cannot be better than the leader by more than POINTS (default: 0.5; of --choose_by gold: "
        "hundredths of a nat). A batch is a share of the requests; a generated answer, as gsm8k's, counts as one, "
        "though it takes longer than a choice. --seed draws the items",
    )
    add(
        "--search",
        choices=("cma",),
        help="instead of --weights: find a weight for each model by CMA-ES as in CABS+, from 0.1 to 2, starting at 1; "
        "needs --evaluations and --choose_on. --seed draws the steps",
    )
    add("--evaluations", type=cli.positive_int, metavar="N", help="merges that --search scores at most")
    add(
        "--layer_groups",
        type=cli.positive_int,
        metavar="K",
        help="with --search: a weight for each model and each of K groups of consecutive layers",
    )


def _compare_flags(parser: argparse.ArgumentParser) -> None:
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
    cli.add_verify_flag(parser.add_argument_group("inspecting outputs"))


def check_combination(parser: argparse.ArgumentParser, given: set[str], recipes: int) -> None:
    """Usage error for flags that contradict or do not use one another. recipes: how many --recipe names."""
    sweep = SWEEPS | {"choose_on", "report_on", "choose_by", "keep_models", "race", "evaluations", "layer_groups"}
    scoring = {"dtype", "limit", "model_args"}
    # Tables of (flag, what contradicts it) and (flag, what it needs one of), because `given` are the flags that were
    # typed: argparse itself cannot tell those from defaults.
    refusals = [
        ("verify", given - {"verify"}),
        ("compare", given - {"compare", "plot_path", "against"}),
        (
            "eval_only",
            given
            & ({"merge_only", "recipe", "base_model", "models", "max_shard_size", "seed", "engine", "skip"} | sweep),
        ),
        ("merge_only", given & ({"eval_recipe", "output_path", "batch_size", "name"} | scoring | sweep)),
        ("weights", given & {"weight_grid"}),
        ("search", given & {"weights", "weight_grid", "race"}),
        ("race", given & {"keep_models"}),
    ]
    for flag, clash in refusals:
        if flag in given and clash:
            parser.error(f"--{flag} does not go with {', '.join('--' + name for name in sorted(clash))}")
    for flag in ("merge_only", "search"):
        if flag in given and recipes > 1:
            parser.error(f"--{flag} takes one recipe, and --recipe names {recipes}")
    tried = {"weights", "weight_grid", *(["recipe"] if recipes > 1 else [])}
    for flag, needed in [
        ("choose_on", SWEEPS | tried),
        ("choose_by", SWEEPS | tried),
        ("keep_models", SWEEPS | tried),
        ("race", tried),
        ("search", {"choose_on"}),
        ("search", {"evaluations"}),
        ("evaluations", {"search"}),
        ("layer_groups", {"search"}),
        ("report_on", {"choose_on"}),
        ("plot_path", {"compare"}),
        ("against", {"compare"}),
    ]:
        if flag in given and not given & needed:
            ways = sorted(needed, key=("weights", "weight_grid", "search", *sorted(needed)).index)
            several = ", or several recipes" if "weights" in needed else ""
            parser.error(f"--{flag} needs {' or '.join('--' + name for name in ways)}{several}")


def parsed(description: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults for what was not given. Exits with 2 where flags contradict each other."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (_everyday_flags, _sweep_flags, _compare_flags, _merge_flags, _scoring_flags):
        add_flags(parser)
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    check_combination(parser, given, len(args.recipe or ()))
    for name, value in {**MERGE_DEFAULTS, **EVAL_DEFAULTS, **OTHER_DEFAULTS}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args
