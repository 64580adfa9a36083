"""prune and calibrate as jobs: stage after stage, each committed before the next."""
