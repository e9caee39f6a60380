"""One file, one family of generators: its mathematics."""
