"""Small synthetic data set of drawn people in PAB's layout, rendered from a seed."""
