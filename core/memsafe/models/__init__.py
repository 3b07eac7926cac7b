"""What an engine may run: loading, tokenising, self-check, forwards."""
