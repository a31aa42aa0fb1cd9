"""Calibrations (second moments of layer inputs), and the GPTQ-style rounding that uses them."""
