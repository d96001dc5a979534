"""The parts of `benchmarks/privacy.py`: attacks, their subjects, and what each audit attacks."""
