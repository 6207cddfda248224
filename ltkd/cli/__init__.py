"""The command line ``ltkd``. Each command imports heavy packages when it runs, so ``--help`` is fast."""
