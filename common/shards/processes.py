"""Several processes or hosts of one job, started by torchrun."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """This process and how many there are; number 0 claims the output, shows the progress and publishes."""

    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def group() -> Group:
    """What torchrun says in the environment; one process where it says nothing."""
    return Group(int(os.environ.get("RANK") or "0"), int(os.environ.get("WORLD_SIZE") or "1"))


def wait_for_everyone(processes: Group) -> None:
    """Return when every process of the job is here. Raises ConnectionError if one has stopped.

    No DataError: why it stopped is unknown here, and complete shards stay for the next attempt.
    """
    if processes.count == 1:
        return
    from accelerate import PartialState

    try:
        PartialState(cpu=True).wait_for_everyone()
    except RuntimeError:
        raise ConnectionError("another process of this job has stopped; its own line says why") from None


def deal(sizes: list[int], processes: Group) -> set[int]:
    """The numbers of this process's shards: the largest first, each to the process with the fewest bytes so far.

    deal([5, 4, 3, 2], Group(0, 2)) -> {0, 3}
    """
    loads, mine = [0] * processes.count, set()
    for shard in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = min(range(processes.count), key=lambda rank: (loads[rank], rank))
        loads[owner] += sizes[shard]
        if owner == processes.rank:
            mine.add(shard)
    return mine
