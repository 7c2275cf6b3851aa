"""The training core: state, checkpoints, optimizer, epoch loop, evaluation. Knows nothing of data or models."""
