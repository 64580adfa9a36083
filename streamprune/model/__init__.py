"""The model as a sequence of stages, and the walk of activations through them."""
