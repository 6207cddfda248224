"""Run the command ``ltkd`` as ``python -m ltkd``, which is the form that torchrun needs."""

from ltkd.cli.main import main

main()
