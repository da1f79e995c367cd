"""The mathematics on Gram matrices: pure torch, no files, no processes, no host."""
