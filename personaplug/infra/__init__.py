"""Atomic files, distributed runs, memory, progress, model files."""
