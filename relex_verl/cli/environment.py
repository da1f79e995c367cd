"""What has to be set before torch is loaded; imported first, for that alone."""

import os

# Threads that spin while they wait for each other cost a factor of ten where another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
