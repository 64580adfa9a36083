"""`plan`: predicts the memory, disk space and time that a job needs."""
