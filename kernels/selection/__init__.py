"""Which layers are quantized: model families, presets, patterns and reasons."""
