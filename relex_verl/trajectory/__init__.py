"""A trajectory in memory and on disk: shards, encodings, collectors, the store, and Hugging Face checkpoints."""
