"""Real training jobs on data that needs no network."""
