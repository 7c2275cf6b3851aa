"""Command-line options and recipes. Nothing here imports torch."""
