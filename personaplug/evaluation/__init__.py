"""Evaluate methods: methods × seeds → predictions → scores."""
