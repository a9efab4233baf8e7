"""Which recipes stream, and their parameters tensor by tensor: with and without mergekit the same."""

import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from merge_and_evaluate import recipe_checks
from merge_and_evaluate.merge_methods import register
from merge_and_evaluate.parameters import layer_depths, parameters_of, written_dtype
from merge_and_evaluate.recipes import Recipe, read_recipe
from merge_and_evaluate.streamed_methods import METHODS, is_plain, plain_values, stream_reason, summed_models

NAMES = ["embed.weight", *(f"layers.{i}.{part}.weight" for i in range(5) for part in ("attn", "mlp")), "norm.weight"]


def config_of(method: str, first=None, second=None, base="base", **parameters) -> dict:
    models = [
        {"model": "a", "parameters": first or {"weight": 1.0}},
        {"model": "b", "parameters": second or {"weight": 0.5}},
    ]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    return config if base is None else {**config, "base_model": base}


def checked(config: dict) -> str | None:
    """What the checks that ask mergekit say, or None."""
    try:
        recipe_checks.check_keys("r.yml", config)
        recipe_checks.check_method("r.yml", config)
    except DataError as error:
        return str(error)
    return None


# --- what streams ---------------------------------------------------------------------------------

STREAMING = sorted((ROOT / "recipes").glob("*.yml"))
STREAMING = [path for path in STREAMING if "merge_method" in path.read_text()]


@pytest.mark.parametrize("path", STREAMING, ids=lambda path: path.stem)
def test_every_recipe_of_ours_streams_and_is_read_without_mergekit(path):
    config = read_recipe(str(path)).config
    assert stream_reason(config) is None and is_plain(config) and checked(config) is None


REASONS = [
    ({"merge_method": "slerp"}, "merge_method: slerp is not one of linear, task_arithmetic, ties"),
    ({"slices": []}, "slices: "),
    ({"modules": {}}, "modules: "),
    ({"tokenizer": {"source": "base"}}, "tokenizer: "),
    ({"tokenizer_source": "union"}, "tokenizer_source: "),
    ({"chat_template": "auto"}, "chat_template: "),
    ({"dtype": "float64"}, "dtype: float64"),
    ({"base_model": "x+lora"}, r"model: 'x\+lora' asks mergekit for more than a path"),
]


@pytest.mark.parametrize(("change", "reason"), REASONS, ids=[next(iter(change)) for change, _ in REASONS])
def test_what_does_not_stream_says_which_key(change, reason):
    import re

    config = {**config_of("task_arithmetic"), **change}
    assert re.match(reason, stream_reason(config)) and not is_plain(config)


def test_a_key_that_is_there_but_empty_changes_nothing():
    assert stream_reason({**config_of("ties"), "tokenizer": None, "slices": None}) is None


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_parameters_is_the_registry(method):
    """Names, types, which may stand beside a model, defaults: as mergekit (and our adapter) declare them."""
    from mergekit.merge_methods import registry

    register()
    specs = {spec.name: spec for spec in registry.get(method).spec.parameters}
    assert specs.keys() == METHODS[method].keys()
    for name, parameter in METHODS[method].items():
        spec = specs[name]
        assert parameter.needed == spec.required and parameter.per_model == (spec.scope.value != "shared"), name
        assert spec.required or parameter.default == spec.default, name
        example = {float: 0.5, int: 3, bool: True, str: (parameter.choices or ("",))[0]}[parameter.kind]
        assert type(spec.validate(example)) is parameter.kind, name
        for choice in parameter.choices:
            spec.validate(choice)


# --- the quick check accepts nothing that the full one refuses -------------------------------------

VALUE = st.sampled_from(
    [
        0.5,
        1,
        0,
        -1,
        2.0,
        64,
        256,
        True,
        False,
        None,
        "1e-1",
        "x",
        "sign",
        "none",
        "float16",
        math.nan,
        math.inf,
        [0.1, 0.9],
        [],
    ]
    + [[{"filter": "mlp", "value": 0.3}, {"value": 1}], {"value": 1}]
)
NAME = st.sampled_from([*{name for table in METHODS.values() for name in table}, "wieght", "gamma"])
PARAMETERS = st.one_of(st.none(), st.dictionaries(NAME, VALUE, max_size=3), st.just({"weight": 0.7}))
MODEL = st.sampled_from(["a", "b", "base", "a+b", "a@c", "", None, {"model": {"path": "c"}}])
ENTRY = st.fixed_dictionaries({"model": MODEL, "parameters": PARAMETERS}, optional={"weight": st.just(1)})
CONFIG = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from([*METHODS, "slerp", "tise"]),
        "models": st.one_of(st.none(), st.lists(ENTRY, max_size=3)),
    },
    optional={
        "base_model": st.sampled_from(["base", "a", "", None]),
        "parameters": PARAMETERS,
        "dtype": st.sampled_from(["float32", "float16", "float64", "fp16", None]),
        "out_dtype": st.sampled_from(["bfloat16", None, "int8"]),
        "models_": st.just(1),
    },
)
FITTING = {float: [0.5, 1, 0.0, -1.0], int: [64, 256], bool: [True, False]}


@st.composite
def usual(draw) -> dict:
    """A recipe as people write them: known parameters, each where it may stand, with values of its type."""
    method = draw(st.sampled_from(list(METHODS)))

    def some(per_model: bool) -> dict:
        names = sorted(name for name, p in METHODS[method].items() if p.per_model == per_model)
        chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        parameters = {name: METHODS[method][name] for name in chosen}
        return {name: draw(st.sampled_from(p.choices or FITTING[p.kind])) for name, p in parameters.items()}

    models = [{"model": name, "parameters": {"weight": 0.5} | some(True)} for name in "ab"]
    config = {"merge_method": method, "models": models, "parameters": some(False), "dtype": "float32"}
    return config if method == "linear" else {**config, "base_model": "base"}


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.one_of(usual(), CONFIG))
def test_what_the_quick_check_accepts_the_full_one_accepts(config):
    if is_plain(deepcopy(config)):
        assert checked(config) is None


@pytest.mark.parametrize("method", METHODS)
def test_and_it_accepts_the_usual(method):
    shared = {name: p.choices[-1] if p.choices else p.default for name, p in METHODS[method].items() if not p.per_model}
    shared |= {"base": None} if method == "linear" else {}  # whose base would need a weight as well
    config = config_of(method, first={"weight": 1}, second={"weight": -0.5}, **shared)
    assert is_plain(config) and checked(config) is None
    config = config_of(method, first={}, second={"weight": 2}, weight=0.5)
    assert is_plain(config) and checked(config) is None


SLIPS = [
    (config_of("ties", wieght=1), "parameters: merge_method ties ignores the parameter 'wieght'"),
    (config_of("cabs", first={"weight": 1, "n": 300}), "n is 300 and m is 256"),
    (config_of("cabs", consensus="sing"), "consensus is 'sing'"),
    (config_of("magnitude", density=1.5), "density is 1.5; input should be less than or equal to 1"),
    (config_of("linear", base=None) | {"models": [{"model": "a"}]}, "model a has no weight"),
    (config_of("ties", first={"weight": math.nan}), "weight is nan; it must be a finite number"),
    (config_of("task_arithmetic", density=0.5), "ignores the parameter 'density'"),
    (config_of("ties", first={"weight": 1, "normalize": False}), "'normalize' holds for the whole merge"),
]


@pytest.mark.parametrize(("config", "words"), SLIPS, ids=[words[:30] for _, words in SLIPS])
def test_slips_are_refused_in_the_words_of_the_full_check(tmp_path, config, words):
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(DataError) as error:
        read_recipe(str(path))
    assert words in str(error.value)


def test_a_plain_recipe_imports_neither_torch_nor_mergekit(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump(config_of("cabs", consensus="sign")))
    code = (
        "import sys; from merge_and_evaluate.recipes import *; from merge_and_evaluate.parameters import *;"
        f"import merge_and_evaluate.sums;r = read_recipe({str(path)!r}); parameters_of(r, ['x']); with_weights(r, "
        "(0.5,));print([m for m in ('torch', 'transformers', 'mergekit', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- values by tensor -----------------------------------------------------------------------------


def by_reader(config: dict, names: list[str], depths: dict) -> dict:
    """mergekit's planner: ConfigReader with one slice of all models, its parameters resolved at each depth."""
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods import registry
    from mergekit.parameter_resolver import resolve_parameters

    register()
    read, spec = MergeConfiguration.model_validate(config), registry.get(config["merge_method"]).spec
    sources = [InputSliceDefinition(model=m.model, layer_range=(0, 5), parameters=m.parameters) for m in read.models]
    if read.base_model and read.base_model not in [source.model for source in sources]:
        sources.append(InputSliceDefinition(model=read.base_model, layer_range=(0, 5)))
    found = {}
    for name in names:
        reader = ConfigReader(config=read, t=depths[name], slice_out=OutputSliceDefinition(sources=sources))
        inputs = {source.model: name for source in sources}
        found[name] = resolve_parameters(
            spec,
            tensor_name=name,
            inputs=inputs,
            sources=reader.parameter_sources,
            base_model=read.base_model,
            t=reader.t,
        )
    return found


SETTINGS = [
    {"weight": 0.5},
    {"weight": [0, 0.5, 1]},
    {"weight": ["1e-1", 1]},
    {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "layers.3.", "value": 7}, {"value": 0.25}]},
    {"weight": {"filter": "*", "value": 2}},
    {"weight": [{"filter": "attn", "value": 1}], "density": [1.0, 0.25]},
]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "magnitude"])
@pytest.mark.parametrize("first", SETTINGS, ids=str)
@pytest.mark.parametrize("base", ["base", "b"])
def test_values_are_those_of_mergekits_reader(method, first, base):
    known = METHODS[method]
    first = {name: setting for name, setting in first.items() if name in known}
    config = config_of(method, first=first, second={"weight": 3}, base=base, weight=[0.3, 0.6])
    ours = parameters_of(Recipe("r.yml", "", config), NAMES)
    depths = {n: 0.0 if "layers" not in n else int(n.split(".")[1]) / 4 for n in NAMES}
    for name, (shared, models) in by_reader(config, NAMES, depths).items():
        assert ours[name].shared == shared, name
        theirs = {str(model): values for model, values in models.items() if values}
        assert dict(zip(summed_models(config), ours[name].models, strict=True)) == theirs, name


@settings(max_examples=100, deadline=None)
@given(st.one_of(usual(), CONFIG))
def test_plain_values_are_those_of_mergekits_reader(config):
    if is_plain(config) and checked(config) is None:
        ours = plain_values(config)
        shared, models = by_reader(config, ["x"], {"x": 0.0})["x"]
        assert ours.shared == shared
        theirs = {str(model): values for model, values in models.items() if values}
        assert dict(zip(summed_models(config), ours.models, strict=True)) == theirs


def test_linear_sums_its_base_too():
    assert summed_models(config_of("linear", weight=1.0)) == ["a", "b", "base"]
    assert summed_models(config_of("linear", base="a")) == ["a", "b"]
    assert summed_models(config_of("ties", base="a")) == ["b"]


def test_a_tensor_without_a_value_is_named():
    config = config_of("ties", first={"weight": [{"filter": "mlp", "value": 1}]})
    with pytest.raises(DataError, match=r"r.yml: tensor 'embed.weight': Missing required parameter weight for a.embed"):
        parameters_of(Recipe("r.yml", "", config), NAMES)


def test_what_only_a_tensors_values_show_is_refused():
    config = config_of("linear", first={"weight": [1, -1]}, second={"weight": 1}, base=None)
    with pytest.raises(
        DataError, match=r"tensor 'layers.4.attn.weight': the weights sum to 0, and linear divides by that"
    ):
        parameters_of(Recipe("r.yml", "", config), NAMES)
    config = config_of("cabs", first={"weight": 1, "n": [{"filter": "mlp", "value": 9}, {"value": 1}]}, n=1, m=8)
    with pytest.raises(DataError, match=r"tensor 'layers.0.mlp.weight': model a: n is 9 and m is 8; cabs keeps n"):
        parameters_of(Recipe("r.yml", "", config), NAMES)


# --- layers by name -------------------------------------------------------------------------------


def architectures() -> list[Path]:
    import mergekit._data.architectures as folder

    return sorted(Path(folder.__path__[0]).glob("*.json"))


def modules(definition: dict) -> list[dict]:
    """The modules of one of mergekit's architecture files, or the one it is."""
    parts = definition.get("modules")
    return [part.get("architecture", part) for part in parts.values()] if parts else [definition]


@pytest.mark.parametrize("path", architectures(), ids=lambda path: path.stem)
def test_layers_lie_where_mergekit_has_them(path):
    """Names alone place every weight of every architecture that mergekit describes: layer i of 3 at i / 2, the rest at
    0."""
    for module in modules(json.loads(path.read_text())):
        layered = [w["name"] for w in (module.get("layer_templates") or {}).get("weights", [])]
        layered = [
            name for name in layered if "${layer_index}" in name
        ]  # Qwen2-VL's merger has none: one name, two depths
        loose = [w["name"] for key in ("pre_weights", "post_weights") for w in module.get(key) or []]
        wanted = {name.replace("${layer_index}", str(i)): i / 2 for name in layered for i in range(3)}
        wanted |= {name: 0.0 for name in loose}
        found = layer_depths(wanted)
        assert found == wanted


def test_layers_of_stacks_side_by_side():
    names = [
        "v.blocks.0.w",
        "v.blocks.1.w",
        "t.h.0.experts.7.w",
        "t.h.1.experts.0.w",
        "t.h.2.w",
        "one.0.w",
        "head",
        "0.weight",
    ]
    assert list(layer_depths(names).values()) == [0.0, 1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("config", "dtypes", "written"),
    [
        ({"out_dtype": "bfloat16", "dtype": "float32"}, ["F16"], "BF16"),
        ({"dtype": "float16"}, ["F32"], "F16"),
        ({}, ["BF16", "BF16"], "BF16"),
        ({}, ["F16", "BF16"], "F32"),
        ({}, ["F16", "F32"], "F32"),
    ],
)
def test_written_dtype(config, dtypes, written):
    assert written_dtype(config, dtypes) == written
