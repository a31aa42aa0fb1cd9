"""Safetensors files: reading, validation and atomic writing. Nothing here knows about FP8."""
