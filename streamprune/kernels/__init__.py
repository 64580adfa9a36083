"""Mask selection and input statistics: the same functions for Numba (cpu) and Torch (torch_ops)."""
