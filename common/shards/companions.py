"""The files beside a model's weights that belong to it: tokenizer, processors, chat template; never code.

One list for local copies and for downloads from the Hub.
"""

import json
import shutil
from pathlib import Path

from common.shards.documents import read_json, refuse_lfs_pointer

# Any of these is a tokenizer, or the part of one that others are made from (byte tokenizers have a config alone).
TOKENIZERS = (
    "tokenizer*",
    "vocab.*",
    "vocab-*.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "prophetnet.tokenizer",
    "entity_vocab.json",
    "dict.txt",
)
# What transformers' tokenizers (VOCAB_FILES_NAMES) and processors read: a test holds the list to theirs, because
# importing transformers to ask would take a second of every start.
COMPANIONS = (
    *TOKENIZERS,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "target_vocab.json",
    "word_pronunciation.json",
    "word_shape.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def _found(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")


def companion_files(directory: Path) -> list[Path]:
    """Tokenizer, processors, chat template and generation config of a model directory; never code."""
    return _found(directory, COMPANIONS)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer: tokenizer.json, vocab.json with merges.txt, a SentencePiece model, …"""
    return bool(_found(directory, TOKENIZERS))


def check_companions(directory: Path) -> None:
    """Refuse companion files whose copies would be no good: Git LFS pointers, and configs that are no JSON.

    Before a weight is read: they are copied when everything else is done.
    """
    for path in companion_files(directory):
        refuse_lfs_pointer(path)
        if _is_config(path):
            read_json(path, strict=False)


def _is_config(path: Path) -> bool:
    return path.name.endswith("_config.json")


def without_code(value):
    """A config without the `auto_map` entries that name Python files beside it, nested configs included.

    Those files are neither run nor copied, so the entries would lead nowhere; "org/name--module.Class" names a Hub
    repository and stays.
    without_code({"auto_map": {"AutoConfig": "configuration_x.X"}, "n": 1}) -> {"n": 1}
    """
    if isinstance(value, list):
        return [without_code(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: without_code(item) for key, item in value.items()}
    if "auto_map" in kept:
        kept["auto_map"] = _with_code(kept["auto_map"])
        if not kept["auto_map"]:
            del kept["auto_map"]
    return kept


def _with_code(auto_map):
    """What of an auto_map (a mapping to names, to lists of names, or such a list) names a Hub repository."""
    if isinstance(auto_map, dict):
        return {key: name for key, name in auto_map.items() if _is_elsewhere(name)}
    return auto_map if _is_elsewhere(auto_map) else None


def _is_elsewhere(names) -> bool:
    names = [name for name in (names if isinstance(names, list) else [names]) if name is not None]
    return bool(names) and all(isinstance(name, str) and "--" in name for name in names)


def code_note(config: dict, directory: Path, label: str) -> str | None:
    """A line about the code that a model's config.json names, which is never run; None where it names none."""
    if "auto_map" not in config:
        return None
    if without_code(config) == config:
        return f"{label} names code of a Hub repository: auto_map in config.json. It was not run; outputs name it, too"
    files = sorted(path.name for path in directory.glob("*.py"))
    beside = f" ({', '.join(files[:4])}{', …' if len(files) > 4 else ''} beside it)" if files else ""
    return (
        f"{label} brings code of its own: auto_map in config.json{beside}. It was not run and is not copied, and "
        "outputs do not name it; to load one with that code, copy the .py files and the auto_map from there"
    )


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, following symbolic links (the Hub's cache is made of links); see without_code."""
    for path in companion_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        if _is_config(path):
            _copy_config(path, place)
        else:
            shutil.copyfile(path, place)


def _copy_config(source: Path, target: Path) -> None:
    """Byte for byte, unless it names code."""
    content = read_json(source, strict=False)
    stripped = without_code(content)
    if stripped == content:
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps(stripped, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
