"""Data sets: folders of images, CIFAR-10, digits, synthetic images."""
