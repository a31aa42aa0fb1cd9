"""Safetensors files: read, validated and written atomically. Knows nothing about FP8."""
