"""Run folders as a table, its statistics and plots."""
