"""Between a file and the kernels: which layers, the three ways a file marks them, reading, writing, verifying."""
