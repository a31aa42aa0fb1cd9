"""Measurements of roundings: on the weights of a model (comparison), and over a range of values (rounding_curve)."""
