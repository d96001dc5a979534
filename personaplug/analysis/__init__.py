"""Metrics, significance tests, results, tables and figures. This package does not import torch."""
