"""How increments and moments are kept: sparse bf16, quantised float32, moments; and a step of a rank in few flat arrays.

What is made of them stands in `trajectory.kinds`.
"""

from relex_verl.trajectory.encodings.mixed import MixedStep, read_step, stored_step
from relex_verl.trajectory.encodings.packed import PackedStep, Packing, Row, StoredStep

__all__ = ["MixedStep", "PackedStep", "Packing", "Row", "StoredStep", "read_step", "stored_step"]
