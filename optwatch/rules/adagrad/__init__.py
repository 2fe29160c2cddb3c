"""Adagrad: the sum of all squared gradients."""
