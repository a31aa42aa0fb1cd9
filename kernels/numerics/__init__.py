"""The numbers: formats, scaling, rounding and error statistics of tensors, on any device."""
