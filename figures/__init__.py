"""Pictures of what a model does: functions that take a model, images or predictions and return a matplotlib Figure.

For visualize.py, reports and notebooks. Nothing here opens a window: a notebook shows a returned Figure by itself, and
`figure.savefig(path)` writes it.
"""
