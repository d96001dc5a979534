"""The server's routes, a router for each subject."""
