"""Logs of apps as people export them: find the meaning of each column, leave out unusable rows, declare the task."""
