"""What the examples' tables are made of."""

import math


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    first, *lines = ["| " + " | ".join(line) + " |" for line in [head, *rows]]
    return "\n".join([first, "|---" * len(head) + "|", *lines])


def mean_and_stderr(values: list[float]) -> str:
    """[70.0, 72.0] -> '71.00 ± 1.00'; of one value the standard error is not known: '70.00'."""
    mean = f"{math.fsum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {stderr_of_mean(values):.2f}"


def stderr_of_mean(values: list[float]) -> float:
    """[70.0, 72.0] -> 1.0: standard deviation (n − 1) over √n."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
