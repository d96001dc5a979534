"""Offline jobs: answers or personas for all rows of Parquet files, in one process or on Ray."""
