"""Data: sources of uint8 images, and what turns them into batches."""
