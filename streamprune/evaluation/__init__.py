"""evaluate: the perplexity of one model, and how far two are apart."""
