"""The method: the trained module and how it is applied."""
