"""Command lines that contradict themselves: exit 2 and a line that says which flag, before anything is looked at."""

import argparse

import pytest
from checkpoints import MAINS, run, usage_error

from common.cli import byte_size

PAIR = ["--task_vector_path1", "a", "--task_vector_path2", "b", "--save_directory1", "c", "--save_directory2", "d"]
USAGE = {
    "n > m": ([*PAIR, "--n", "4", "--m", "3"], "--n 4 of --m 3: n is how many of m are kept, so at most m"),
    "n alone": ([*PAIR, "--n", "300"], "--n 300 of --m 256: n is how many of m are kept, so at most m"),
    "no n": ([*PAIR, "--n", "0"], "argument --n: '0' is not a whole number of at least 1"),
    "huge m": ([*PAIR, "--m", str(2**63)], f"argument --m: '{2**63}' is not a whole number of at least 1"),
    "n for random": (
        [*PAIR, "--pruning_method", "random", "--n", "64"],
        "--n is not used by --pruning_method random, only by nm",
    ),
    "m for magnitude": (
        [*PAIR, "--pruning_method", "magnitude", "--m", "64"],
        "--m is not used by --pruning_method magnitude, only by nm",
    ),
    "sparsity for nm": (
        [*PAIR, "--sparsity_level", "0.5"],
        "--sparsity_level is not used by --pruning_method nm, only by random and magnitude",
    ),
    "seed for magnitude": (
        [*PAIR, "--pruning_method", "magnitude", "--seed", "1"],
        "--seed is not used by --pruning_method magnitude, only by random",
    ),
    "sparsity 1": (
        [*PAIR, "--pruning_method", "random", "--sparsity_level", "1"],
        "argument --sparsity_level: '1' is not a fraction from 0 up to, not including, 1",
    ),
    "sparsity nan": (
        [*PAIR, "--pruning_method", "random", "--sparsity_level", "nan"],
        "argument --sparsity_level: 'nan' is not a fraction from 0 up to, not including, 1",
    ),
    "size": (
        [*PAIR, "--max_shard_size", "5X"],
        "argument --max_shard_size: '5X' is not a size such as 5GB, 500MB or 4GiB",
    ),
    "too many": (
        ["--task_vector_paths", *["a"] * 256, "--save_directories", *["b"] * 256],
        "256 task vectors: at most 255 at a time",
    ),
    "unequal": (["--task_vector_paths", "a", "b", "--save_directories", "c"], "2 task vectors but 1 save directories"),
    "incomplete": (
        PAIR[:6],
        "--task_vector_path1, --task_vector_path2, --save_directory1 and --save_directory2 go together; for another "
        "number of vectors use --task_vector_paths and --save_directories",
    ),
    "both ways": (
        [*PAIR, "--task_vector_paths", "a"],
        "give either --task_vector_paths and --save_directories, or the numbered flags, not both",
    ),
    "nothing": (
        [],
        "give the vectors and where the results go: --task_vector_path1/2 and --save_directory1/2, or "
        "--task_vector_paths and --save_directories",
    ),
}


@pytest.mark.parametrize("flags, line", USAGE.values(), ids=USAGE)
def test_usage(capsys, flags, line):
    assert usage_error(capsys, "prune", *flags) == line


def test_usage_of_the_others(capsys):
    wrong = usage_error(capsys, "convert", "--dtype", "int8")
    assert wrong == "argument --dtype: invalid choice: 'int8' (choose from 'bfloat16', 'float16', 'float32')"
    assert usage_error(capsys, "convert", "--model", "x", "--nonsense") == "unrecognized arguments: --nonsense"
    assert usage_error(capsys, "extract", "--save_path", "x") == (
        "the following arguments are required: --finetuned_model_path, --base_model_path"
    )


def test_sizes():
    """Powers of ten and of two, fractions, plain bytes."""
    sizes = {
        "5GB": 5 * 10**9,
        "500mb": 5 * 10**8,
        "4GiB": 4 * 2**30,
        "1.5KB": 1500,
        "7": 7,
        "7B": 7,
        "2 MiB": 2 * 2**20,
    }
    assert {text: byte_size(text) for text in sizes} == sizes
    for text in ("", "GB", "5X", "0", "nan", "inf", "1e999GB", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            byte_size(text)


@pytest.mark.parametrize("script", MAINS)
def test_help_opens_with_what_it_does_and_a_command(capsys, script):
    """--help teaches by example: a sentence, then a command to paste."""
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    text = capsys.readouterr().out.split("\n\n")
    assert stop.value.code == 0 and text[0].startswith("usage:")
    assert text[1].endswith(".") and text[2].strip().startswith("python ")
