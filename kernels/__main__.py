"""`python -m kernels IN.safetensors OUT.safetensors`: see kernels/command."""

import gc
import io
import sys

from .command.starting import quiet_start

if __name__ == "__main__":
    with quiet_start():
        from .command.main import main

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")  # pipes on Windows default to a code page without − and ∞
        gc.freeze()  # torch's objects live until exit; collecting them there would take a third of a second
    sys.exit(main())
