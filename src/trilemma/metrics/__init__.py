"""Pure functions of features; they do not know which family drew the images."""
