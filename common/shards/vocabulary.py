"""Which rows of an embedding two models have in common, by their tokenizers."""

from dataclasses import dataclass
from itertools import chain, pairwise

from common.errors import DataError, reason_of
from common.shards.architecture import quiet_transformers
from common.shards.checkpoint import Checkpoint
from common.shards.headers import Tensor
from common.shards.matching import row_axis, vocabulary_names

SHOWN = 20  # tokens that a note lists


@dataclass(frozen=True)
class Vocabulary:
    """Ids that mean the same token in both models, as runs (first, one past the last), and what is said of the rest."""

    runs: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


def runs_of(ids: list[int]) -> tuple[tuple[int, int], ...]:
    """Sorted numbers as runs: [0, 1, 2, 5, 7, 8] -> ((0, 3), (5, 6), (7, 9))."""
    edges = [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1]
    return tuple((ids[a], ids[b - 1] + 1) for a, b in pairwise([0, *edges, len(ids)]) if a < b)


def tokens_of(checkpoint: Checkpoint) -> dict[str, int]:
    """{token: id} of a model's tokenizer, of any kind; added tokens included."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            # Left unsaid, transformers asks on the terminal whether to run a model's own code, and runs it on "y".
            flags = {"local_files_only": True, "trust_remote_code": False}
            return dict(AutoTokenizer.from_pretrained(str(checkpoint.path), **flags).get_vocab())
    except Exception as error:  # files from anyone, and tokenizers fail in as many ways as there are kinds
        raise DataError(
            f"{checkpoint.label}: its tokenizer cannot be read ({reason_of(error):.200}); --vocabulary common compares "
            "the tokenizers of both models, so put its files beside the weights"
        ) from None


def _listed(tokens: dict[str, int]) -> str:
    """ "2 tokens: '<|im_start|>' (16), '<|im_end|>' (17)", by id."""
    shown = [f"{token!r:.40} ({number})" for token, number in sorted(tokens.items(), key=lambda item: item[1])]
    more = len(shown) - SHOWN
    return (
        f"{len(shown)} token{'s' * (len(shown) > 1)}: "
        + ", ".join(shown[:SHOWN])
        + (f" and {more} more" if more > 0 else "")
    )


def common_vocabulary(base: Checkpoint, finetuned: Checkpoint) -> Vocabulary:
    """The ids that are the same text in both tokenizers. Raises DataError if there are none, or no tokenizer."""
    mine, theirs = tokens_of(base), tokens_of(finetuned)
    same = sorted(number for token, number in mine.items() if theirs.get(token) == number)
    if not same:
        raise DataError(
            f"no token has the same id in the tokenizers of {finetuned.label} and {base.label}; "
            f"is {finetuned.label} a fine-tuned model of {base.label}?"
        )
    notes = [f"{len(same)} of {len(mine)} tokens of {base.label} have the same id in {finetuned.label}"]
    for one, tokens, others, fate in (
        (finetuned, theirs, mine, "left out"),
        (base, mine, theirs, "their rows stay as they are"),
    ):
        alone = {token: number for token, number in tokens.items() if others.get(token) != number}
        if alone:
            notes.append(f"in {one.label} alone, {fate}: {_listed(alone)}")
    return Vocabulary(runs_of(same), tuple(notes))


def common_elements(
    base: Checkpoint, pairs: dict[str, Tensor], vocabulary: Vocabulary
) -> dict[str, tuple[tuple[int, int], ...]]:
    """{tensor: runs of elements that both models have}, for every tensor with a row for each token.

    Element i of a run is element i of the fine-tuned tensor, too: rows are equally long and have equal ids. 18 rows of
    8 against 16: ((0, 128),).
    """
    found = {}
    for name in vocabulary_names(base, pairs):
        mine, theirs = base.tensors[name], pairs[name]
        rows = min(tensor.shape[row_axis(tensor.shape)] for tensor in (mine, theirs))
        width = mine.numel // max(1, mine.shape[row_axis(mine.shape)])
        cut = ((start, min(stop, rows)) for start, stop in vocabulary.runs if start < rows)
        found[name] = tuple((start * width, stop * width) for start, stop in cut)
    return found


def pieces(blocks, runs: tuple[tuple[int, int], ...] | None):
    """(start, stop, whether both have it) for every block cut at the runs' ends; runs None: both have everything.

    pieces([(0, 4), (4, 8)], ((1, 6),)) -> (0, 1, False), (1, 4, True), (4, 6, True), (6, 8, False)
    """
    if runs is None:
        yield from ((start, stop, True) for start, stop in blocks)
        return
    edges = list(chain.from_iterable(runs))  # ascending; an even number of them before a point: outside
    at = 0
    for start, stop in blocks:
        while start < stop:
            while at < len(edges) and edges[at] <= start:
                at += 1
            end = min(stop, edges[at]) if at < len(edges) else stop
            yield start, end, at % 2 == 1
            start = end
