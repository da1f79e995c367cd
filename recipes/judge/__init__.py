"""The judge judged: simulated runs with a known truth, decided by relex-verl's own search, tests and schedule of cuts."""
