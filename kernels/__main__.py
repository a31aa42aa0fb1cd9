"""`python -m kernels IN.safetensors OUT.safetensors`: see kernels/command."""

import sys

from .command.main import main

if __name__ == "__main__":
    sys.exit(main())
