"""Measurements of roundings: all of them on the weights of a model, one of them on a range of values."""
