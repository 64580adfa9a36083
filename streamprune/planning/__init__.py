"""plan: what a job will take in memory, disk and time, before it starts."""
