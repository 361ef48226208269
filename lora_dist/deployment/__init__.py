"""What is done with a trained adapter: classify, merge, export, serve."""
