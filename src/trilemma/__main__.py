"""`python -m trilemma`, as `torchrun` needs it."""

from trilemma.cli import main

main()
