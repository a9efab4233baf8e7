"""What two models do not have in common: left out with --skip, or refused by pattern."""

from fnmatch import fnmatchcase

from common.errors import DataError
from common.shards.checkpoint import Checkpoint
from common.shards.headers import Tensor
from common.shards.names import left_over


def skipped(skip: tuple[str, ...], *names: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in skip for name in names)


def check_skip(base: Checkpoint, others: list[Checkpoint], skip: tuple[str, ...]) -> None:
    """Refuse a pattern that matches nothing: it is a typing error. Of several models one may have what it names."""
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for checkpoint in [base, *others] for name in checkpoint.tensors):
            labels = " or ".join(checkpoint.label for checkpoint in [*others, base])
            raise DataError(f"--skip {pattern!r}: no tensor of {labels} has such a name; correct it")


def refuse_left_over(base, other, pairs: dict[str, Tensor], only: tuple[list[str], list[str]], skip) -> None:
    """DataError for parameters that only one model has: how many agree, the rest by pattern, and what to do."""
    if not any(only):
        return
    said, advice = [], []
    for checkpoint, names, kept in zip(
        (base, other), only, (pairs.keys(), {t.name for t in pairs.values()}), strict=True
    ):
        if names:
            what, found = left_over(names, kept)
            said.insert(0, f"only in {checkpoint.label}: {what}")
            advice = [*found, *advice]
    total, left = len(pairs) + len(only[0]) + len(only[1]), len(only[0]) + len(only[1])
    line = f"{len(pairs)} of {total} tensors agree; {'; '.join(said)}; "
    # Of the smaller model: a language model is less than half of a vision-language model, and wholly in it.
    smaller = len(pairs) + min(len(only[0]), len(only[1]))
    if 2 * len(pairs) < smaller or skip is None or len(advice) > 8:
        raise DataError(f"{line}is {other.label} a fine-tuned model of {base.label}?")
    patterns = " ".join(repr(pattern) for pattern in dict.fromkeys(advice))
    raise DataError(f"{line}leave {'it' if left == 1 else 'them'} out with --skip {patterns}")
