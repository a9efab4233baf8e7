"""Which tensors of two models belong together, from headers alone; which are tied."""

from common.errors import DataError
from common.shards.checkpoint import Checkpoint
from common.shards.headers import FLOAT_DTYPES, Tensor

EMBEDDING_ENDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
HEAD_ENDINGS = ("lm_head.weight", "embed_out.weight")


def _ends(names, endings: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.endswith(endings)), None)


def says_tied(checkpoint: Checkpoint) -> bool:
    """Whether config.json ties the output head to the input embedding (its architecture's default if silent)."""
    for section in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(section, dict) and isinstance(section.get("tie_word_embeddings"), bool):
            return section["tie_word_embeddings"]
    # Most configs say it; transformers, which is slow to import, is asked only about the others.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return bool(known and getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", False))


def tied_embedding(checkpoint: Checkpoint, head: str) -> Tensor | None:
    """The embedding that stands in for the output head `head`, or None where they are not tied."""
    embedding = _ends(checkpoint.tensors, EMBEDDING_ENDINGS)
    if not head.endswith(HEAD_ENDINGS) or embedding is None or not says_tied(checkpoint):
        return None
    return checkpoint.tensors[embedding]


def mask_names(base: Checkpoint) -> dict[str, str]:
    """{tensor: the name its random mask is drawn under}: a tied head draws under its embedding's name."""
    names = {name: name for name in base.tensors}
    head, embedding = _ends(names, HEAD_ENDINGS), _ends(names, EMBEDDING_ENDINGS)
    if head and embedding and base.tensors[head].shape == base.tensors[embedding].shape and says_tied(base):
        names[head] = embedding
    return names


def _check_shapes(base: Checkpoint, other: Checkpoint, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape == theirs.shape:
        return
    line = f"tensor {mine.name!r} is {list(theirs.shape)} in {other.label} but {list(mine.shape)} in {base.label}; "
    if mine.name.endswith(EMBEDDING_ENDINGS + HEAD_ENDINGS) and mine.shape[1:] == theirs.shape[1:]:
        raise DataError(
            f"{line}the vocabularies differ: bring {other.label} to {mine.shape[0]} rows with "
            f"transformers' resize_token_embeddings({mine.shape[0]}) and save it, or take another model"
        )
    raise DataError(f"{line}is {other.label} a fine-tuned model of {base.label}?")


def check_floats(checkpoint: Checkpoint) -> None:
    """Refuse parameters in a dtype without exact arithmetic here (float64, 8 bits)."""
    for tensor in checkpoint.tensors.values():
        if tensor.is_parameter and tensor.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"tensor {tensor.name!r} is {tensor.dtype} in {checkpoint.label}; needed is float16, "
                "bfloat16 or float32: take an unquantised version of the model"
            )
    if checkpoint.config.get("quantization_config"):  # null and {} say that there is none
        packed = [
            t.name for t in checkpoint.tensors.values() if not t.is_parameter and "weight" in t.name.split(".")[-1]
        ]
        if packed:
            raise DataError(
                f"tensor {packed[0]!r} is {checkpoint.tensors[packed[0]].dtype} in {checkpoint.label}, whose config.json "
                "has a quantization_config; take an unquantised version of the model"
            )
        raise DataError(
            f"{checkpoint.label}: config.json has a quantization_config, but no weight is quantised; if it is left over, "
            "remove it from config.json, or else take an unquantised version of the model"
        )


def _check_kinds(base: Checkpoint, other: Checkpoint) -> None:
    """Refuse a tensor that is a parameter (floating point) in one model and a buffer in the other."""
    for name, theirs in other.tensors.items():
        mine = base.tensors.get(name, theirs)
        if mine.is_parameter != theirs.is_parameter:
            raise DataError(
                f"tensor {name!r} is {theirs.dtype} in {other.label} but {mine.dtype} in {base.label}; "
                "take versions of both models in floating point"
            )


def match(base: Checkpoint, other: Checkpoint) -> dict[str, Tensor]:
    """{name: other's tensor} for every parameter of base, matched by name; tied heads are resolved.

    Raises DataError that names what is missing, left over, or of another shape.
    """
    check_floats(other)
    _check_kinds(base, other)
    pairs = {}
    for name, mine in base.tensors.items():
        if not mine.is_parameter:
            continue
        theirs = other.tensors.get(name) or tied_embedding(other, name)
        if theirs is None:
            raise DataError(
                f"tensor {name!r} is in {base.label} but not in {other.label}; "
                f"is {other.label} a fine-tuned model of {base.label}?"
            )
        _check_shapes(base, other, mine, theirs)
        pairs[name] = theirs
    for name, theirs in other.tensors.items():
        if name not in base.tensors and theirs.is_parameter and not tied_pair(base, other, name):
            raise DataError(
                f"tensor {name!r} is in {other.label} but not in {base.label}; "
                f"is {other.label} a fine-tuned model of {base.label}?"
            )
    return pairs


def tied_pair(base: Checkpoint, other: Checkpoint, head: str) -> tuple[Tensor, Tensor] | None:
    """(head, embedding) of `other` when it spells out a head that both models tie; they must hold the same bytes."""
    if tied_embedding(base, head) is None:
        return None
    embedding = tied_embedding(other, head)
    if embedding is None or embedding.shape != other.tensors[head].shape:
        return None
    return other.tensors[head], embedding


def must_be_equal(base: Checkpoint, other: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors of `other` that are only dropped as tied if their bytes are equal."""
    extra = [name for name in other.tensors if name not in base.tensors and other.tensors[name].is_parameter]
    return [pair for name in extra if (pair := tied_pair(base, other, name))]
