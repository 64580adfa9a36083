"""`prune` and `calibrate` as resumable jobs, which commit one stage of the model after the other."""
