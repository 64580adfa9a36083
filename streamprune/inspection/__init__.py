"""inspect: what the weights of a checkpoint hold."""
