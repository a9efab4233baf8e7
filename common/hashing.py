"""xxh3_128 of files and texts, as hex."""

from pathlib import Path

import xxhash

BLOCK_BYTES = 8 << 20


def text_hash(text: str) -> str:
    """text_hash("") -> '99aa06d3014798d86001c324468d497f'."""
    return xxhash.xxh3_128(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, read in blocks."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()
