"""The running process: memory, threads, signals, standard streams, package versions."""
