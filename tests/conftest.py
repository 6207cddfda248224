"""One thread for every library: the toys are tiny, and threads that wait for each other on a busy machine are slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
