"""The process `fastkd`, or `python -m fastkd`, which torchrun starts: `torchrun --nproc-per-node 8 -m fastkd train CONFIG.yaml`."""

import os
import sys

from .cli.main import main
from .cli.process import open_standard_streams


def run() -> None:
    """Run the command of this process's arguments and end the process with its exit code."""
    open_standard_streams()
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # All is written. An interpreter that is taken down under threads of torch's engines may abort, and the job would have failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
