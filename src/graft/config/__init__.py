"""Configs as plain values: checks, overrides, explanations of errors. Nothing heavy here."""
