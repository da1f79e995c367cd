"""RELEX for verl: rank-1 extrapolation of RLVR weight trajectories (https://arxiv.org/abs/2605.21468).

Importing this package loads neither torch nor verl, ray or wandb: `import verl` imports it as a plugin in every process.
"""

__version__ = "0.1.0"
