"""What the scripts share."""

import os

# numpy's and scipy's OpenBLAS would each start a thread per core, which spin and are never used here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
