"""Scaled FP8 state dicts: written to a file, read, verified and repaired."""
