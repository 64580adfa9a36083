"""What belongs to the running process: memory, threads, signals, streams, versions."""
