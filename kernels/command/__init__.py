"""The headless command, `python -m kernels`: its arguments, its jobs and what it writes to the terminal."""
