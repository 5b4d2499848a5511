"""Fused kernels: one operator each, whose plain reference is in the method's own file."""
