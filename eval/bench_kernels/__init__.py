"""Kernels checked, compiled ahead of time and timed over the shapes of their `arg_specs.py` (`kvx bench kernels`)."""
