"""One offline page on rankings: metrics, curves, failures with pictures, steps of the fusion."""
