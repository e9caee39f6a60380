"""Train any image generator on your own pictures; see its quality, coverage and speed."""

__version__ = "0.1.0"
