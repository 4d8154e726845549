"""Triton kernels, one file per operation. Nothing here knows of autograd, losses or dispatch.

`r1kernels._dispatch` registers launchers for GPUs: functions with the name and the arguments of an operator.
"""
