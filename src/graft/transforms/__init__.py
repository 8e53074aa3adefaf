"""What turns rows of a split into inputs of a network: preparing and augmenting images."""
