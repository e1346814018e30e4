"""``python -m mmc_fast``."""

from mmc_fast.cli import main

if __name__ == "__main__":
    main()
