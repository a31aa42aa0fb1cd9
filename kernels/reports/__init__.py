"""What a quantization did, and what another would do, as plain data and tables."""
