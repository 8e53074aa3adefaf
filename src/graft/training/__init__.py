"""The module, the Trainer and the stages: what trains."""
