"""The training core: state, checkpoints, optimizer and schedule, the epoch loop, evaluation.

Knows nothing of data or models.
"""
