"""The frozen prefix of a backbone as a function, and the store of its outputs."""
