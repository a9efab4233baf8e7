"""cabs, magnitude and random in one pass: the chain's masks and the exact sum, bit for bit."""

import json

import oracle
import pytest
import torch
import yaml
from checkpoints import MAINS
from conftest import save_model
from mergekit.merge_methods.base import TensorGroup
from safetensors.torch import load_file, save_file

import merge_and_evaluate_7b as script
from common.errors import DataError
from merge_and_evaluate import merge_methods

NAME = "model.layers.0.mlp.up_proj.weight"


def summed(base, vectors, masks, weights):
    """base + Σ weight · mask · vector in float32, rounded once to base's dtype; untouched base bits stay."""
    out = base.float()
    for vector, mask, weight in zip(vectors, masks, weights, strict=True):
        kept = torch.tensor(mask).reshape(base.shape)
        out = torch.where(kept, out + vector.float() * torch.tensor(weight), out)
    touched = torch.tensor(masks).any(0).reshape(base.shape)
    return torch.where(touched, out.to(base.dtype), base)


def inputs(shape, models: int, dtype=torch.float16, seed: int = 0):
    """A base with -0.0 in it and models near it, with ties, zeros and equal weights among the differences."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    base.view(-1)[::7] = -0.0
    tuned = [
        (base.float() + (torch.randn(shape, generator=generator) * 4).round() / 64).to(dtype) for _ in range(models)
    ]
    return base, tuned


def merged_by(method, base, tuned, dtype=torch.float32, **parameters):
    """One tensor through mergekit's own calling convention, as a recipe with `dtype: float32` does it."""
    tensors = [tensor.to(dtype) for tensor in [*tuned, base]]
    names = [f"m{9 - i}" for i in range(len(tuned))]  # in list order, which is not alphabetical
    group = TensorGroup.from_tensors(tensors, ids=[*names, "base"], base_index=len(tuned), name=NAME)
    (merged,) = method([group], parameters=parameters)
    return merged


CASES = [
    (merge_methods.cabs, {"n": 1, "m": 4}, {"n": 1, "m": 4}),
    (merge_methods.cabs, {"n": 3, "m": 8}, {"n": 3, "m": 8}),
    (merge_methods.cabs, {"n": 5, "m": 8}, {"n": 5, "m": 8}),
    (merge_methods.cabs, {"n": 4, "m": 16, "conflict_aware": False}, {"n": 4, "m": 16, "conflict_aware": False}),
    (merge_methods.magnitude, {"density": 0.3}, {"method": "magnitude", "sparsity_level": 0.7}),
    (
        merge_methods.magnitude,
        {"density": 0.6, "conflict_aware": True},
        {"method": "magnitude", "sparsity_level": 0.4, "conflict_aware": True},
    ),
    (merge_methods.random, {"density": 0.1, "seed": 7}, {"method": "random", "sparsity_level": 0.9, "seed": 7}),
    (
        merge_methods.random,
        {"density": 0.7, "conflict_aware": True},
        {"method": "random", "sparsity_level": 0.3, "conflict_aware": True},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters", "rule"), CASES, ids=lambda value: getattr(value, "spec", value) and ""
)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_against_the_slow_oracle(method, parameters, rule, models):
    """Odd sizes, ties, zeros, -0.0: every bit of the merged float16 tensor."""
    base, tuned = inputs((13, 19), models)
    weights = [1.2, 0.9, -0.4][:models]
    vectors = [oracle.extract(tensor, base, torch.float16) for tensor in tuned]
    masks = oracle.masks(vectors, NAME, **rule)
    merged = merged_by(method, base, tuned, weight=weights, **parameters).to(torch.float16)
    assert oracle.same(merged, summed(base, vectors, masks, weights))
    exact = base.double() + sum(
        w * torch.tensor(m).reshape(base.shape) * v.double() for w, m, v in zip(weights, masks, vectors, strict=True)
    )
    assert ((merged.double() - exact).abs() <= 1e-3 * exact.abs() + 1e-6).all()


@pytest.mark.slow
def test_models_in_another_dtype_than_the_base():
    """bfloat16 models on a float16 base: rounded to the task vector's dtype before the difference, as extraction
    does."""
    base, tuned = inputs((12, 20), 2)
    tuned = [tensor.to(torch.bfloat16) for tensor in tuned]
    vectors = [oracle.extract(tensor, base, torch.float16) for tensor in tuned]
    masks = oracle.masks(vectors, NAME, n=3, m=16)
    merged = merged_by(merge_methods.cabs, base, tuned, weight=1.2, n=3, m=16).to(torch.float16)
    assert oracle.same(merged, summed(base, vectors, masks, [1.2, 1.2]))


def test_float16_inputs_without_a_recipe_dtype_give_the_same():
    """mergekit then hands over float16; the sum is formed in float32 all the same and rounded once."""
    base, tuned = inputs((12, 20), 2)
    wide, narrow = (
        merged_by(merge_methods.cabs, base, tuned, dtype, weight=1.2, n=3, m=16)
        for dtype in (torch.float32, torch.float16)
    )
    assert narrow.dtype == torch.float16 and oracle.same(narrow, wide.to(torch.float16))


def test_n_and_m_per_model():
    """1:4 for the first, 6:16 for the second, least where the first kept."""
    base, tuned = inputs((9, 24), 2)
    vectors = [oracle.extract(tensor, base, torch.float16) for tensor in tuned]
    (first,) = oracle.masks(vectors[:1], NAME, n=1, m=4)
    second, flat = [False] * len(first), vectors[1].flatten().tolist()
    for start, stop, k in oracle.scopes("nm", len(flat), 6, 16, 0.0):
        for i in sorted(range(start, stop), key=lambda i: (first[i], -abs(flat[i]), i))[:k]:
            second[i] = True
    merged = merged_by(merge_methods.cabs, base, tuned, weight=1.0, n=[1, 6], m=[4, 16]).to(torch.float16)
    assert oracle.same(merged, summed(base, vectors, [first, second], [1.0, 1.0]))


def test_rescale_divides_by_the_density():
    base, tuned = inputs((16, 16), 1)
    vectors = [oracle.extract(tuned[0], base, torch.float16)]
    masks = oracle.masks(vectors, NAME, method="random", sparsity_level=0.75)
    merged = merged_by(merge_methods.random, base, tuned, weight=0.5, density=0.25, rescale=True).to(torch.float16)
    assert oracle.same(merged, summed(base, vectors, masks, [0.5 * 4]))


def test_what_is_not_finite_is_named():
    base, tuned = inputs((4, 8), 2)
    tuned[1].view(-1)[3] = float("nan")
    with pytest.raises(DataError, match=f"tensor '{NAME}' of m8 holds NaN or infinity; take another model"):
        merged_by(merge_methods.cabs, base, tuned, weight=1.0)
    base, tuned = inputs((4, 8), 1)
    base[0], tuned[0][0] = -60000.0, 60000.0
    with pytest.raises(DataError, match="m9 minus base is beyond the largest number of the task vector's dtype"):
        merged_by(merge_methods.cabs, base, tuned, weight=1.0)


# --- whole models, by recipe ----------------------------------------------------------------------


@pytest.fixture
def bfloat16_models(tmp_path, monkeypatch):
    """base in float16, the fine-tuned models zulu and alpha in bfloat16 and several shards."""
    save_model(tmp_path / "base", 0)
    for seed, name in ((3, "zulu"), (5, "alpha")):
        save_model(tmp_path / name, seed, "bfloat16")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(method: str, **parameters) -> None:
    models = [
        {"model": f"./{name}", "parameters": {"weight": weight}} for name, weight in (("zulu", 1.2), ("alpha", 0.9))
    ]
    text = yaml.safe_dump(
        {
            "merge_method": method,
            "base_model": "./base",
            "models": models,
            "parameters": parameters,
            "dtype": "float32",
            "out_dtype": "float16",
        }
    )
    with open("recipe.yml", "w") as file:
        file.write(text)
    script.main(["--recipe", "recipe.yml", "--save_path", "merged", "--merge_only", "--overwrite"])


WHOLE = [
    ("cabs", {"n": 3, "m": 16}, ["--pruning_method", "nm", "--n", "3", "--m", "16"]),
    ("cabs", {"n": 48, "m": 64}, ["--pruning_method", "nm", "--n", "48", "--m", "64"]),
    ("magnitude", {"density": 0.25}, ["--pruning_method", "magnitude", "--sparsity_level", "0.75"]),
    ("random", {"density": 0.25, "seed": 3}, ["--pruning_method", "random", "--sparsity_level", "0.75", "--seed", "3"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters", "flags"), WHOLE, ids=["cabs", "cabs_overlap", "magnitude", "random"])
def test_one_pass_equals_the_chain(bfloat16_models, method, parameters, flags):
    """extract, prune (the vectors alone), add by hand = one pass; zulu, first of the list, is pruned first."""
    names = ["zulu", "alpha"]
    for name in names:
        MAINS["extract"](["--finetuned_model_path", name, "--base_model_path", "base", "--save_path", f"tv_{name}"])
    MAINS["prune"](
        [
            "--task_vector_paths",
            *[f"tv_{name}" for name in names],
            "--save_directories",
            *[f"pv_{name}" for name in names],
            "--save_format",
            "task_vector",
            *flags,
        ]
    )
    recipe(method, **parameters)
    merged, base, first, second = (
        load_file(f"{folder}/model.safetensors") for folder in ("merged", "base", "pv_zulu", "pv_alpha")
    )
    for name in base:
        vectors = [first[name], second[name]]
        masks = [vector.flatten().ne(0).tolist() for vector in vectors]
        assert oracle.same(merged[name], summed(base[name], vectors, masks, [1.2, 0.9])), name


@pytest.mark.slow
def test_tied_heads_stay_tied(bfloat16_models):
    """A head that both models spell out and config.json ties draws its random mask under the embedding's name."""
    for name in ("base", "zulu", "alpha"):
        folder = bfloat16_models / name
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        tensors = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe("random", density=0.25)
    merged = load_file("merged/model.safetensors")
    assert oracle.same(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert (merged["lm_head.weight"] != load_file("base/model.safetensors")["lm_head.weight"]).any()
