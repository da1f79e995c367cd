"""Values in, files and figures out. It decides nothing."""
