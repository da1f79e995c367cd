"""The systems that the paper compares RELEX with and that are no weight vector of floor 0: each in its own module.

What each needs, costs and gives, and where it differs from its authors' code, stands in relex_verl/docs/offline.md.
"""

__all__ = ["SOURCES"]

# Name in `relex.json` -> where it comes from, as in `extrapolators.METHODS`.
SOURCES = {
    "weight-extrapolation": "Wang et al. 2026, Weight Extrapolation, arXiv:2601.04537",
    "transformer": "Wei et al. 2026, Table 2, arXiv:2605.21468",
    "alpharl": "Cai et al. 2026, AlphaRL, arXiv:2510.00553",
    "next": "Chen et al. 2026, NExt, arXiv:2604.11446",
}
