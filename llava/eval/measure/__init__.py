"""Time, work and memory of methods."""
