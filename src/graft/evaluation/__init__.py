"""A run made anew from its folder, and its predictions."""
