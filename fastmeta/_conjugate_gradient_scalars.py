"""The numbers of a conjugate-gradient solve that stay on the device: a row of float64 for each iteration.

``triton_kernels/conjugate_gradient.py`` and ``fastmeta/ops/_solvers/updates.py`` read and write the same rows.
"""

SLOPE = 0  # <r, z>
SQUARED = 1  # <r, r>
TARGET = 2  # <r, r> to reach
COUNT = 3  # iterations made
STATUS = 4  # one of those below
ROW = 8  # numbers in a row: 64 bytes keep the rows aligned

RUNNING = 0
CONVERGED = 1
NEGATIVE = 2  # curvature below zero along a direction
FLAT = 3  # no curvature along a direction, or a preconditioner at the end of its precision
NOT_FINITE = 4
