"""``python -m ltkd`` is the command ``ltkd``; torchrun starts it so."""

from ltkd.cli.main import main

main()
