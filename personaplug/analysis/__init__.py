"""Metrics, significance tests, results, tables and figures; needs numpy, never torch."""
