"""The persona plug: the trained module and its use."""
