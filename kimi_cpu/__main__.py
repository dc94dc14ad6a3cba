"""`python -m kimi_cpu` is `kimi-cpu`."""

import sys

from kimi_cpu.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
