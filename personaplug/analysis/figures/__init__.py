"""Figures of results, drawn with matplotlib: of several sets, of one set, of a report."""
