"""What the scripts share: two rooms, and three files that every script uses.

shards/     checkpoints in and out: headers, matching, planned files, blocks through threads, files complete or absent
pruners/    which positions are kept: the ranking rule, its kernels, what it did
cli.py      command-line types, the flags that several scripts have
exits.py    how a script ends: exit codes, signals, the one line of an error
errors.py   the one exception that users see
"""

import os
import sys

if sys.platform == "win32":  # no locks, no fsync of directories, no signals as the scripts use them
    sys.exit("error: Windows is not supported as it is; install WSL (wsl --install) and run the same command in it")

# numpy's and scipy's OpenBLAS would each start a thread per core, which spin and are never used here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
