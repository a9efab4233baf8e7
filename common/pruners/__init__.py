"""Which positions are kept, in reading order.

pruning.py       the ranking rule: scopes, budgets, random limits, masks block by block
thresholds.py    ranking in a scope that is larger than a block
prune_tensor.py  one tensor of all vectors: read, prune, add, count
kernels/         the arithmetic: numba on the CPU, torch on a GPU, the same bits
devices.py       does a device compute the CPU's bits
report.py        what pruning did: counts, figures, the printed table
heatmaps.py      the same as pictures
pictures.py      pictures, written whole
"""
