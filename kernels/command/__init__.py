"""The command `python -m kernels`: arguments, jobs, and what it prints."""
