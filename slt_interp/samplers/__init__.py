"""Kernels, the loop that runs them and the diagnostics of what comes out."""
