"""kvx against transformers with kvpress, side by side in one run: `python -m kvx.eval.bench_peers`."""
