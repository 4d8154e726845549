"""The R1 recipe: a thin trainer on the public API of r1kernels."""
