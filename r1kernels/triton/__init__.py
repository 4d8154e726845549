"""Triton kernels, one file per operation. Nothing here knows of autograd, losses or dispatch."""
