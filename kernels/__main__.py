"""`python -m kernels IN.safetensors OUT.safetensors`: see kernels/command."""

import gc
import io
import sys

from .command.main import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # pipes on Windows default to a code page without − and ∞
    gc.freeze()  # torch's objects live until exit; collecting them there would take a third of a second
    sys.exit(main())
