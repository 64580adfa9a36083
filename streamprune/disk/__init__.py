"""What is on disk: checkpoints that are read, and everything that is written."""
