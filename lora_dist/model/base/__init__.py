"""The base model: loading, its head, the size of its images, and models without a head."""
