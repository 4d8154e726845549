"""Triton kernels, one file per operation. Nothing here knows of autograd, losses or dispatch.

`LAUNCHERS` are registered for GPUs by `r1kernels._library`, under the name of the operator whose arguments they take.
"""
