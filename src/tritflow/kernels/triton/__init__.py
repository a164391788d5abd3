"""Ternary kernels in plain Triton: for any GPU that Triton compiles for, any shape. Importing this is safe anywhere."""
