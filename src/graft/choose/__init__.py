"""Which backbone and which transfer plan for this data: a measured race within a budget of time."""
