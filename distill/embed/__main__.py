"""python -m distill.embed: take vectors you already have into a store."""

import sys

from distill.embed.taking import main

if __name__ == "__main__":
    sys.exit(main())
