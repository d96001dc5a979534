"""Logs of apps as people export them: find what each column is, clean the rows, declare the task."""
