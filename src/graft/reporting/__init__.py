"""What people see of a run: the console, loggers, TensorBoard, pictures."""
