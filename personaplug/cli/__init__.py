"""The command line and the quickstart."""
