"""Infrastructure: atomic files, distributed runs, memory, progress, model files."""
