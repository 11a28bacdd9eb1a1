"""Render a small synthetic data set in PAB's layout, for the demo, tests and benchmarks."""
