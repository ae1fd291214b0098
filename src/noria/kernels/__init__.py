"""Kernels of our own for CUDA devices, in Triton: a kernel a file, beside it what it is given as arrays.

Only files that are imported where CUDA and Triton exist import triton. No kernel knows models, ranks or steps.
"""
