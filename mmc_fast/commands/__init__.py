"""What each command does, behind the argument parsing of ``mmc_fast.cli``. Imported on use: they load torch."""
