"""Pictures, written completely or not at all."""

from pathlib import Path

from common.errors import DataError


def save_figure(figure, path: Path) -> None:
    """Write a picture, completely or not at all; the file's ending says the format (png, pdf, svg)."""
    from io import BytesIO

    from common.shards.staging import write_file

    data, kind = BytesIO(), path.suffix.lstrip(".").lower() or "png"
    try:
        figure.savefig(data, format=kind, dpi=150)
    except ValueError:
        raise DataError(
            f"{path}: matplotlib cannot write {kind!r}; use a name that ends in .png, .pdf or .svg"
        ) from None
    write_file(path, data.getvalue())
