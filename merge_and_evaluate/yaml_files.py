"""YAML files, read with suspicion."""

from itertools import count
from pathlib import Path

from common.errors import DataError

MAX_VALUES = 100_000  # of a file, its aliases written out; a few lines of aliases of aliases can mean billions


def _written_out(value):
    """The value with a copy of its own wherever YAML's `*alias` repeats one: what is set in one place stays there."""
    counted = count()

    def copied(value):
        if next(counted) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values with its aliases written out")
        if isinstance(value, dict):
            return {key: copied(each) for key, each in value.items()}
        return [copied(each) for each in value] if isinstance(value, list) else value

    return copied(value)


def read_yaml(path: str) -> tuple[str, dict]:
    """(text, mapping) of a YAML file, whose parts are in one place each. Raises DataError where it is missing or not a
    mapping."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        value = _written_out(yaml.safe_load(text))
    except FileNotFoundError:
        raise DataError(f"{path}: no such recipe; the ones that come with this collection are in recipes/") from None
    # ValueError: bytes that are no UTF-8, and what YAML takes for a date that the calendar lacks (2024-13-45).
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: no valid YAML ({reason:.160}); fix the recipe") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: found {type(value).__name__}; it must be a mapping of keys to values")
    return text, value
