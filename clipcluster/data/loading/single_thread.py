"""Imported by the fork server before anything else: libraries loaded after it use one thread and do not spin.

OpenMP and BLAS read these variables once, when they are loaded; what a worker sets later comes too late.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
