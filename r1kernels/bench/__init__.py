"""The command `r1kernels bench`: time, memory and numerical fidelity of every public operation beside its peers.

`cli` reads the arguments, `run` goes through the cases, `engine` checks and times the candidates of one task, `cases`
declares the tasks, `fidelity` measures errors against float64, and `results` writes the document. It uses the public
API and `r1kernels.testing` only.
"""
