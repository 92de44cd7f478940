"""What holds for every test: one compute thread, since tests share their cores with the clusters that they start."""

import os

# Before torch and numba are imported anywhere: both read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
