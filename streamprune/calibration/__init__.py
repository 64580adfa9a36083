"""What calibration gathers: texts, windows of tokens, statistics, Gram matrices."""
