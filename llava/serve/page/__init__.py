"""A page to look at: ask a model about a picture and see what a method kept for the question."""
