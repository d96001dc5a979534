"""Engines: what answers a request once it has its persona."""
