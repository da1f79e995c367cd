"""Shards -> increments -> trajectory -> G -> weights -> predicted tensors, on all ranks together."""
