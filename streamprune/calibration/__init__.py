"""Calibration data: texts, windows of tokens, input statistics, Gram matrices."""
