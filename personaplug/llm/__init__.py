"""Frozen language models that take soft prompts."""
