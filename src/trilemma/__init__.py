"""Train any image generator on your own pictures; see its quality, coverage and speed."""
