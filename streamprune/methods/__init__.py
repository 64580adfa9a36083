"""The mathematics of pruning: pure functions, arrays in, arrays out."""
