"""``python -m ltkd`` is the command ``ltkd``; torchrun starts it so."""

from ltkd.cli import main

main()
