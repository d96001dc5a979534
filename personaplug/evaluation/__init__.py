"""Ask the models: methods × seeds → predictions → scores."""
