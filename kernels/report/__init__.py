"""What a quantization did: the report, as plain data and as tables."""
