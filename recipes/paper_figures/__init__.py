"""Figures 2 and 6 and Table 3 of arXiv:2605.21468 from a run that is recorded whole."""
