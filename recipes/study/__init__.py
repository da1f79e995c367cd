"""The study: does a prefix of a GRPO run tell where its weights will be? One command, see run.sh and RESULTS.md."""
