"""How many ns an element the kernels take: on the CPU beside topk and scatter, on a GPU beside a copy.

torch and numba are imported within: bench.py imports this file, and what its process holds would count as the memory of
the scripts that it starts.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common.shards.systems import cores


def rates_on_cpu() -> dict[str, float]:
    """ns per element and vector of nm 64:256 for two vectors on all cores: ours, and topk + scatter."""
    import torch

    from benchmarks.in_memory import nm_mask
    from common.pruners import kernels

    values = (np.random.default_rng(0).standard_normal(1 << 22) * 0.002).astype(np.float16)
    blocks = values.view(np.uint16).reshape(-1, kernels.BLOCK)
    threads = cores()
    torch.set_num_threads(threads)

    def ours(block):
        first, second = kernels.empty_masks(2, block.size)
        kernels.nm_mask(first, block, "F16", None, 0, 64, 256)
        kernels.nm_mask(second, block, "F16", first, 1, 64, 256)

    def obvious():
        tensor = torch.from_numpy(values)
        return nm_mask(tensor * ~nm_mask(tensor, 64, 256), 64, 256)

    def best(call, repeats):  # the shortest time: what else the machine does can only add to it
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times) / values.size / 2 * 1e9

    with ThreadPoolExecutor(threads) as pool:
        fast = best(lambda: list(pool.map(ours, blocks)), 20)
    return {"ours_ns": fast, "topk_scatter_ns": best(obvious, 3), "threads": threads}


def rates_on_gpu() -> dict[str, float]:
    """ns per element of each method's mask of a float16 vector on the GPU, and of a plain copy on it and to it; empty
    without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from common.pruners.kernels import engine

    gpu = engine("cuda")
    values = (np.random.default_rng(0).standard_normal(gpu.BLOCK) * 0.002).astype(np.float16).view(np.uint16)
    bits = gpu.load(values)
    mask, taken = gpu.empty_masks(2, values.size)
    gpu.nm_mask(taken, bits, "F16", None, 0, 64, 256)
    counts, above, ties = np.zeros(1 << 15, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    calls = {
        "nm 64:256, first vector": lambda: gpu.nm_mask(mask, bits, "F16", None, 0, 64, 256),
        "nm 64:256, second vector": lambda: gpu.nm_mask(mask, bits, "F16", taken, 1, 64, 256),
        "random": lambda: gpu.random_mask(mask, 0, 7, None, [1 << 30]),
        "magnitude, counting": lambda: gpu.count_keys(counts, above, bits, "F16", None, 0, 0, 1 << 15, 0),
        "magnitude, mask": lambda: gpu.threshold_mask(mask, bits, "F16", None, 0, 0x1800, ties),
        "copy on the card": bits.clone,
        "copy to the card": lambda: gpu.load(values),
    }

    def nanoseconds(call) -> float:
        # A call only queues the work, so the clock is read when the card is idle; the first calls load and allocate.
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 20 / values.size * 1e9

    return {"name": torch.cuda.get_device_name()} | {name: nanoseconds(call) for name, call in calls.items()}
