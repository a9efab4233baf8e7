"""Which positions are kept, in reading order.

pruning.py       the ranking rule: scopes, budgets, random limits
order.py         vectors in their order: how many earlier ones kept a position
masks.py         masks of one tensor, asked for block by block
thresholds.py    ranking in a scope that is larger than a block
prune_tensor.py  one tensor of all vectors: read, prune, add, count
lora_tensor.py   one tensor of a vector from a LoRA adapter
unchanged.py     tensors that a vector does not change
kernels/         the arithmetic: numba on the CPU, torch on a GPU, the same bits
devices.py       does a device compute the CPU's bits
tally.py         counts of one tensor, by name
report.py        what pruning did: figures, the printed table
heatmaps.py      the same as pictures
pictures.py      pictures, written completely or not at all
"""
