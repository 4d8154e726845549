"""Benchmarks of a GPU, run by `benchmarks/run_on_gpu.sh` (`PYTHONPATH=.:benchmarks python -m gpu`).

A case checks every candidate against float64, then times them in turns and appends its rows to a file of JSON lines,
from which the report is built. On the CPU, with --small, the same lines run as a rehearsal.
"""
