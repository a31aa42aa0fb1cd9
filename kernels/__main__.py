"""`python -m kernels IN.safetensors OUT.safetensors`: see kernels/command."""

import gc
import sys

from .command.main import main

if __name__ == "__main__":
    gc.freeze()  # what torch has made lives to the end: searching it for garbage takes a third of a second there
    sys.exit(main())
