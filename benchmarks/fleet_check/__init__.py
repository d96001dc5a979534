"""The parts of `benchmarks/fleet.py`: server processes, clients that know what they should get, and the final check."""
