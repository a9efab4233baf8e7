"""YAML files, read with suspicion."""

from pathlib import Path

from common.errors import DataError


def read_yaml(path: str) -> tuple[str, dict]:
    """(text, mapping) of a YAML file. Raises DataError where it is missing or not a mapping."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        value = yaml.safe_load(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such recipe; the ones that come with this collection are in recipes/") from None
    # ValueError: bytes that are no UTF-8, and what YAML takes for a date that the calendar lacks (2024-13-45).
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: no valid YAML ({reason:.160}); fix the recipe") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {type(value).__name__}; it must be a mapping of keys to values")
    return text, value
