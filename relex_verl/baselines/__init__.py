"""The systems that the paper compares RELEX with and that are no weight vector of floor 0: each in its own module.

What each needs, costs and gives, and where it differs from its authors' code, stands in README.md beside this file.
"""
