"""The frame of the project."""

#: The release, as in pyproject.toml (a test compares). Machines of one installation all have the same.
__version__ = "0.1.0"
