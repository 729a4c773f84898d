"""Training: from a config to the update, the loop around it, and what the loop writes."""
