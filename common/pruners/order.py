"""Vectors in their order, each with how many earlier ones kept a position: rank (1) of the ranking rule."""

from collections.abc import Iterator


def in_order(masks: list, conflict_aware: bool, engine) -> Iterator[tuple]:
    """Vector by vector: (j, its mask, how many earlier vectors kept each position, how many those are).

    The caller must fill the mask before it asks for the next vector, whose counts are formed from it (uint8; None for
    the first vector, and without conflict_aware). The mask of the last may stay as it is.

        for j, mask, taken, levels in in_order(masks, True, engine):
            engine.nm_mask(mask, bits[j], dtypes[j], taken, levels, n, m)
    """
    taken, room = None, None
    for j, mask in enumerate(masks):
        yield j, mask, taken, j if conflict_aware else 0
        if conflict_aware and j + 1 < len(masks):
            if taken is not None:
                room = engine.empty_masks(1, len(mask))[0] if room is None else room
                engine.count_taken(room, taken, mask)
            taken = mask if taken is None else room
