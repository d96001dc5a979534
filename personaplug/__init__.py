"""Personalize a frozen language model with a small trained plug."""
