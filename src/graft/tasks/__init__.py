"""What is optimised and measured."""
