"""`python -m fastkd`, which is what torchrun starts: `torchrun --nproc-per-node 8 -m fastkd train CONFIG.yaml`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
