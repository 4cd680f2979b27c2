"""Which classes of the Transformers library can be pruned: a test that sorts all of them."""
