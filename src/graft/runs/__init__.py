"""The run folder: created, recorded, locked, resumed, and a config run in it."""
