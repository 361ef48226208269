"""Ways of training on one process or many."""
