"""Rounding chosen by what a layer's output loses on inputs that it was seen to get."""
