"""What answers a request once its persona is known."""
