"""One training run, whatever its host: configuration, schedule, cuts, decisions, output. It imports no verl."""
