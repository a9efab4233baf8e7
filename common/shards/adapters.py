"""LoRA adapters: which tensors of the base they change, and by what.

An adapter (peft) is adapter_config.json and, for each adapted weight W [out, in], A [rank, in] and B [out, rank]:
W + scale · B·A. Anything else in it replaces a tensor of the base as a whole (modules_to_save). Headers only.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import DataError
from common.shards import bins, headers
from common.shards.checkpoint import Checkpoint
from common.shards.companions import check_companions
from common.shards.documents import read_json
from common.shards.findings import ADAPTER_FILES, has_weights
from common.shards.headers import FLOAT_DTYPES, Tensor
from common.shards.leftover import skipped
from common.shards.matching import Match, check_shapes
from common.shards.resolving import names_in

CONFIG = "adapter_config.json"
MERGE = "merge it with peft's merge_and_unload(), save the model and extract from that"
# Settings under which W + scale · B·A of the base is not what the adapter does.
UNLIKE_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA of replicated layers",
    "megatron_config": "Megatron's LoRA",
    "lora_bias": "LoRA with biases",
    "target_parameters": "LoRA of bare parameters",
    "trainable_token_indices": "LoRA with trainable tokens",
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that move weights of the base
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>A|B)(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<which>A|B)(?:\.[^.]+)?")
_WHOLE = re.compile(r"\.(?:modules_to_save\.[^.]+|original_module|base_layer)(?=\.)")


@dataclass(frozen=True)
class Product:
    """What an adapter adds to one tensor: scale · B·A, or its transpose (embeddings, GPT-2's Conv1D)."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float
    transposed: bool
    copy: Tensor | None = None  # of the base's tensor, which peft saves beside adapted embeddings; must equal it

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """Every tensor of the adapter that is read for it."""
        return (self.a, self.b, self.copy) if self.copy else (self.a, self.b)


@dataclass(frozen=True)
class Adapter:
    """An adapter for a base. `checkpoint` has its own tensors and the base's config."""

    checkpoint: Checkpoint
    config: dict
    products: dict[str, Product]  # {base's name: what is added}
    whole: dict[str, Tensor]  # {base's name: the tensor that replaces it}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return (directory / CONFIG).is_file() and not has_weights(directory)


def _check_kind(label: str, config: dict) -> None:
    """Refuse what is not a plain LoRA, by name."""
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        raise DataError(
            f"{label}: an mlx_lm adapter, and only peft's are read here; fuse it with mlx_lm.fuse and extract from the "
            "result"
        )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise DataError(f"{label}: an adapter of type {kind!r:.40}; only LORA is read here; {MERGE}")
    for key, name in UNLIKE_LORA.items():
        if config.get(key):
            raise DataError(f"{label}: {name} ({key} in {CONFIG}), and only plain LoRA is read here; {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise DataError(
            f"{label}: init_lora_weights is {start!r:.40}, so it belongs to a base that peft has changed, not to the "
            f"published one; {MERGE}"
        )


def _read_tensors(label: str, directory: Path) -> list[Tensor]:
    for name in ADAPTER_FILES:
        path = directory / name
        if path.is_file():
            return headers.read_file_header(path) if path.suffix == ".safetensors" else bins.read_file(path)
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    there = (
        f" (but {found[0]}; if that is the adapter, rename it to {ADAPTER_FILES[0]})"
        if found
        else "; download the adapter again"
    )
    raise DataError(f"{label}: {CONFIG} but no {' or '.join(ADAPTER_FILES)} in it{there}")


def _pattern_value(label: str, config: dict, key: str, module: str, default):
    """The value of rank_pattern or alpha_pattern for a module: of the first key that ends its name, as peft does."""
    table = config.get(key) or {}
    try:
        found = (v for k, v in table.items() if re.fullmatch(rf"(?:.*\.)?(?:{k})", module))
        return next(found, default)
    except (re.error, AttributeError):
        raise DataError(
            f"{label}: {key} in {CONFIG} is not a table of module names; download the adapter again"
        ) from None


def _scale(label: str, config: dict, module: str, rank: int) -> float:
    """alpha/r of a module, or alpha/√r (rsLoRA), in float64."""
    inner = module.removeprefix("base_model.model.")
    said = _pattern_value(label, config, "rank_pattern", inner, config.get("r"))
    alpha = _pattern_value(label, config, "alpha_pattern", inner, config.get("lora_alpha"))
    if said != rank or rank < 1:
        raise DataError(
            f"{label}: module {inner!r} has rank {rank} in its tensors but {said!r:.40} in {CONFIG}; download the "
            "adapter again"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 2**63:
        raise DataError(
            f"{label}: lora_alpha of {inner!r} is {alpha!r:.40}, not a finite number; download the adapter again"
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _is_transposed(label: str, base: Tensor, a: Tensor, b: Tensor, by_config: bool) -> bool:
    """Whether the base's tensor is stored [in, out]; its shape says so, or the config where it is square."""
    fits = len(a.shape) > 1 and b.shape[1:2] == a.shape[:1] and b.numel == b.shape[0] * a.shape[0]
    rows, columns = (b.shape[0], a.numel // max(1, a.shape[0])) if fits else (0, 0)
    plain = base.shape[:1] == (rows,) and base.numel == rows * columns
    turned = base.shape == (columns, rows)
    if not fits or not (plain or turned):
        raise DataError(
            f"tensor {base.name!r} is {list(base.shape)} in the base, and A {list(a.shape)} and B {list(b.shape)} of "
            f"{label} do not fit it; is it an adapter of this base?"
        )
    return turned and (by_config or not plain)


def _sorted_out(label: str, tensors: list[Tensor]) -> tuple[dict[str, dict[str, Tensor]], set[str], dict[str, Tensor]]:
    """({weight: {"A": tensor, "B": tensor}}, those of them that are embeddings, {name: tensor} of the rest)."""
    factors, embeddings, whole = {}, set(), {}
    for tensor in tensors:
        if not tensor.is_parameter or tensor.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"tensor {tensor.name!r} is {tensor.dtype} in {label}; needed is float16, bfloat16 or float32: {MERGE}"
            )
        found = _FACTOR.fullmatch(tensor.name) or _EMBEDDING.fullmatch(tensor.name)
        if found:
            name = f"{found['module']}.weight"
            factors.setdefault(name, {})[found["which"]] = tensor
            if _EMBEDDING.fullmatch(tensor.name):
                embeddings.add(name)
        elif "lora_" in tensor.name or "trainable_tokens" in tensor.name:
            raise DataError(f"tensor {tensor.name!r} in {label}: of a kind that plain LoRA does not have; {MERGE}")
        elif (name := _WHOLE.sub("", tensor.name)) in whole:  # one of them is the layer as it was before training
            raise DataError(
                f"tensors {whole[name].name!r} and {tensor.name!r} of {label} replace the same tensor; save the "
                "adapter with peft's save_pretrained"
            )
        else:
            whole[name] = tensor
    return factors, embeddings, whole


def _product(adapter: Checkpoint, config: dict, module: str, own: Tensor, pair: tuple[Tensor, Tensor, bool]) -> Product:
    """What the adapter adds to the base's tensor `own`; pair: (A, B, whether the config says it is stored
    transposed)."""
    a, b, by_config = pair
    scale = _scale(adapter.label, config, module, a.shape[0] if a.shape else 0)
    return Product(a, b, scale, _is_transposed(adapter.label, own, a, b, by_config))


def _checked_copy(copy: Tensor | None, own: Tensor, adapter: Checkpoint, base: Checkpoint) -> Tensor | None:
    """The adapter's own copy of an adapted tensor. Raises DataError if that has another shape: a resized vocabulary."""
    if copy and copy.shape != own.shape:
        raise DataError(
            f"tensor {own.name!r} is {list(copy.shape)} in {adapter.label} but {list(own.shape)} in {base.label}; "
            f"{MERGE}"
        )
    return copy


def open_adapter(label: str, directory: Path, base: Checkpoint, free_rows: bool = False) -> Adapter:
    """The LoRA adapter in a directory, for `base`: every header read and checked, no weight read.

    free_rows as in match(). Raises DataError for other kinds of adapters, and for tensors that the base does not have.
    """
    config = read_json(directory / CONFIG)
    _check_kind(label, config)
    check_companions(directory)
    tensors = _read_tensors(label, directory)
    factors, embeddings, whole = _sorted_out(label, tensors)
    place = names_in(base, [*factors, *whole])
    lost = [name for name in [*factors, *whole] if name not in place]
    if lost:
        raise DataError(
            f"{len(lost)} of the {len(factors) + len(whole)} tensors that {label} changes are not in {base.label}, "
            f"the first {lost[0]!r:.200}; is it an adapter of this base? Otherwise {MERGE}"
        )
    found = Checkpoint(label, directory.resolve(), {tensor.name: tensor for tensor in tensors}, base.config)
    # A constant is the base's own whatever the adapter's copy says, as in a fine-tuned model. A tensor that is adapted
    # and stored whole, too, is what peft saves beside adapted embeddings: a copy of the base's.
    whole = {name: tensor for name, tensor in whole.items() if base.tensors[place[name]].is_parameter}
    adapted = {place[name] for name in factors}
    copies = {place[name]: tensor for name, tensor in whole.items() if place[name] in adapted}
    replaced = {place[name]: tensor for name, tensor in whole.items() if place[name] not in adapted}
    products: dict[str, Product] = {}
    for name, pair in factors.items():
        own = base.tensors[place[name]]
        if pair.keys() != {"A", "B"} or own.name in products:
            raise DataError(f"tensor {name!r} of {label}: needs one A and one B; download the adapter again")
        by_config = name in embeddings or bool(config.get("fan_in_fan_out"))
        product = _product(found, config, name.removesuffix(".weight"), own, (pair["A"], pair["B"], by_config))
        products[own.name] = replace(product, copy=_checked_copy(copies.get(own.name), own, found, base))
    check_shapes(base, found, replaced, replaced if free_rows else ())
    return Adapter(found, config, products, replaced)


def without(adapter: Adapter, base: Checkpoint, skip: tuple[str, ...]) -> Adapter:
    """The adapter without what it does to tensors of the base of these names (fnmatch).

    Raises DataError for a pattern that matches no tensor of the base, such as one of the adapter's own names.
    """
    wrong = [pattern for pattern in skip if not any(skipped((pattern,), name) for name in base.tensors)]
    if wrong:
        raise DataError(
            f"--skip {wrong[0]!r}: no tensor of {base.label} has such a name, and what {adapter.checkpoint.label} "
            "changes is left out by the base's names; correct it"
        )
    left = [{n: t for n, t in part.items() if not skipped(skip, n)} for part in (adapter.products, adapter.whole)]
    return replace(adapter, products=left[0], whole=left[1])


def match_adapter(base: Checkpoint, adapter: Adapter) -> Match:
    """What match() gives for a model, of the tensors that the adapter replaces as a whole."""
    count = f"{len(adapter.products)} tensor{'s' * (len(adapter.products) != 1)}"
    notes = [f"{adapter.checkpoint.label}: a LoRA adapter that changes {count} of {base.label}"]
    if adapter.whole:
        notes.append(f"it replaces {len(adapter.whole)} more as a whole: {', '.join(sorted(adapter.whole)[:4])}")
    return Match(adapter.whole, tuple(notes))
