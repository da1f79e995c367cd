"""The same pipeline on finished runs, the paper's analyses, and the systems that it compares with."""
