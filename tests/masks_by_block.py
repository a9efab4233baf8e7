"""All masks of a tensor, block by block: what the loop of a script does, without files."""

from common.pruners.masks import Masks


def masks_by_block(pruning, name, dtypes, numel, read, engine, block=None, peek=None):
    """(start, stop, vectors' bits, their masks) of one tensor's blocks; read(j, start, stop) -> bits of vector j."""
    masks = Masks([pruning] * len(dtypes), name, dtypes, numel, engine, block)
    if masks.in_passes:
        masks.find_thresholds(masks.scanning(read), peek or read)
    for start, stop in masks.blocks():
        vectors = [read(j, start, stop) for j in range(len(dtypes))]
        yield start, stop, vectors, masks.of(start, vectors)
