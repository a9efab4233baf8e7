"""What transformers knows of a model: the names it loads, old names, ties, what is no weight.

Asked only where the names of two models do not agree as they are, or where a tensor's shape says that it may be
a constant or a spelled-out tie: importing transformers takes seconds, which an ordinary job does not pay. The model is
built on the meta device, where no weight exists, from config.json and transformers' own classes; code that comes with
a model is never run. A model that transformers does not know is None, and its names are taken as they are.
"""

import json
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache

from common.shards.fused import Fused, fusions
from common.shards.headers import Tensor

# A config may come from anyone, and every layer it asks for is built (as names): the deepest public models have a few
# hundred layers and experts.
MAX_LAYERS = 4096


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, as a model on the meta device describes it. All names are this version's."""

    name: str  # e.g. 'GPT2LMHeadModel'
    loads: frozenset[str]  # parameters and persistent buffers
    modules: frozenset[str]
    passing: frozenset[str]  # buffers that are made from the config and never loaded
    ties: dict[str, str]  # {name: the first name of its tie group}, of names that share one parameter
    vocabulary: frozenset[str]  # input embeddings, output head, the head's bias
    ignored: str | None  # regular expression of what it leaves out of a checkpoint without a word
    prefix: str  # of the inner model: 'transformer' in 'transformer.h.0.…'
    renamings: tuple = field(repr=False)  # transformers' own, old names to new ones
    fused: tuple[Fused, ...] = ()  # experts that it holds as one tensor and checkpoints do not
    unsaved: frozenset[str] = frozenset()  # parameters that it makes itself and never saves: Marian's positions

    def name_of(self, name: str) -> str:
        """The name under which this version loads the tensor that a checkpoint calls `name`.

        GPT2LMHeadModel: 'h.0.ln_1.weight' -> 'transformer.h.0.ln_1.weight'; BertModel: '….LayerNorm.gamma' ->
        '….LayerNorm.weight'. A name that it does not know is returned as it is.
        """
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        inner = name.removeprefix(f"{self.prefix}.")
        if self.prefix and name not in self.loads:
            name = next((n for n in (inner, f"{self.prefix}.{name}") if n in self.loads), name)
        return name

    def drops(self, name: str) -> bool:
        """Whether a checkpoint may lack a tensor of this name: transformers leaves it out, or makes it, without a
        word."""
        name = self.name_of(name)
        if name in self.unsaved:  # loaded where they are there, to the values that it would make
            return True
        if name in self.loads:
            return False
        return name in self.passing or bool(self.ignored and re.search(self.ignored, name))

    def has_no_weight(self, name: str) -> bool:
        """Whether `name` is no weight: dropped, or at a module that is there and has no parameter of that name.

        The latter are buffers of earlier versions: 'transformer.h.0.attn.masked_bias' of GPT-J.
        """
        if self.name_of(name) in self.loads:
            return False
        parent = name.rpartition(".")[0]
        places = {parent, f"{self.prefix}.{parent}", parent.removeprefix(f"{self.prefix}.")}
        return self.drops(name) or bool(places & self.modules)


@contextmanager
def quiet_transformers():
    """transformers and its warnings silenced: warnings about a model that nobody loads only worry people."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _is_modest(config: dict) -> bool:
    """Whether nothing in a config asks for more than MAX_LAYERS layers, blocks or experts."""
    for key, value in config.items():
        if isinstance(value, dict) and not _is_modest(value):
            return False
        counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        is_count = re.search("layer|block|expert|depth", key) and not re.search("size|width|dim(s|$)|_ids?$", key)
        if is_count and max(counts, default=0) > MAX_LAYERS:
            return False
    return True


def _model_class(config, architectures):
    """The class that config.json names, or the one transformers has for such a config; None if it has none."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

    named = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    for auto in (AutoModelForCausalLM, AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    return None


def _build(config: dict):
    """The model on the meta device, tied as its config says; None where transformers does not know it."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not _is_modest(config):
        return None
    own = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        with quiet_transformers(), torch.device("meta"):
            settings = CONFIG_MAPPING[model_type].from_dict(own)
            # The kernels a config asks for may not be installed, and none is needed here.
            model = _model_class(settings, config.get("architectures"))._from_config(
                settings, attn_implementation="eager"
            )
            model.tie_weights()
            return model
    except Exception:  # a config from anyone can make transformers raise anything: then it does not know the model
        return None


def _ends(model, *which: str) -> list:
    """[input embeddings, output head] or one of them, as modules; fewer where the model has none (CLIP, ViT)."""
    found = []
    for get in which:
        with suppress(NotImplementedError, AttributeError):
            found.append(getattr(model, get)())
    return [module for module in found if module is not None]


def _ties(model, config: dict) -> dict[str, str]:
    """{name: the group's first name} for all names that share one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied = {name: names[0] for names in groups.values() if len(names) > 1 for name in names}
    # Some biases are tied by key alone (RoBERTa's lm_head.decoder.bias): one object only after loading.
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        tied |= {name: tied.get(source, source), source: tied.get(source, source)}
    if config.get("tie_word_embeddings") is False:
        # T5's class ties its head whatever the config says, and unties it on finding other bytes (T5 1.1).
        heads = {f"{name}.weight" for name, m in model.named_modules() if m in _ends(model, "get_output_embeddings")}
        tied = {name: first for name, first in tied.items() if name not in heads}
    return tied


def _vocabulary(model, ties: dict[str, str]) -> frozenset[str]:
    """Names of tensors with a row for each token, tied names included."""
    modules = _ends(model, "get_input_embeddings", "get_output_embeddings")
    ends = [getattr(module, kind, None) for module in modules for kind in ("weight", "bias")]
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found = {name for name, tensor in named.items() if any(tensor is end for end in ends if end is not None)}
    found |= {name for name in named if name.rpartition(".")[2] == "final_logits_bias"}  # BART's, a buffer [1, tokens]
    groups = {ties[name] for name in found if name in ties}
    return frozenset(found | {name for name, first in ties.items() if first in groups})


@cache
def _architecture(text: str) -> Architecture | None:
    model = _build(json.loads(text))
    if model is None:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = tuple(t for t in mapping if isinstance(t, WeightRenaming))
    loads, ties = frozenset(model.state_dict()), _ties(model, json.loads(text))
    # With duplicates: one buffer that two modules share has two names, and a file may hold either.
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
    ignored = "|".join(f"(?:{pattern})" for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ()))
    return Architecture(
        name=type(model).__name__,
        loads=loads,
        modules=frozenset(name for name, _ in model.named_modules() if name),
        passing=buffers - loads,
        ties=ties,
        vocabulary=_vocabulary(model, ties),
        ignored=ignored or None,
        prefix=model.base_model_prefix or "",
        renamings=renamings,
        fused=fusions(mapping),
        unsaved=frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    )


def architecture(config: dict) -> Architecture | None:
    """What transformers knows of the model of a config.json; None where it knows none."""
    return _architecture(json.dumps(config, sort_keys=True))


# --- constants ------------------------------------------------------------------------------------


def _may_be_constant(tensor: Tensor) -> bool:
    """Whether a floating-point tensor is shaped like a constant: a scalar, or a square of positions [1, 1, n, n].

    These shapes only decide who is asked, not what the answer is: CLIP's logit_scale is a scalar and a weight.
    """
    shape = tensor.shape
    is_square = len(shape) > 2 and shape[-1] == shape[-2] and set(shape[:-2]) == {1}
    return tensor.is_parameter and (not shape or is_square)


def with_constants(tensors: list[Tensor], config: dict) -> list[Tensor]:
    """The tensors, those marked that the architecture does not count among its weights.

    Causal masks and the value that masks (GPT-2's attn.bias, Pythia's masked_bias = -1e9, in float16 -inf) are stored
    in floating point by older versions. They are the same in every model of a kind and are carried over.
    """
    asked = [tensor for tensor in tensors if _may_be_constant(tensor)]
    known = architecture(config) if asked else None
    if known is None:
        return tensors
    constant = {tensor.name for tensor in asked if known.has_no_weight(tensor.name)}
    return [replace(tensor, is_constant=True) if tensor.name in constant else tensor for tensor in tensors]
