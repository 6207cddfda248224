"""The command line ``ltkd``. Heavy packages are imported inside a command, so ``--help`` answers at once."""
