"""The engine: weights and a recipe in, a scaled state dict and a report out."""
