"""Draw what a model does: functions that map a model, images or predictions to a matplotlib Figure.

    explain     computes attention, stages of tokens and channels of layers; draws nothing
    attention   attention of blocks, heads and token layers     tokens     soft splits and tokens
    features    channels of layers, models side by side         mistakes   confusion, accuracy, calibration, errors
    files       figures by name, and their files

A notebook shows a returned Figure by itself; `figure.savefig(path)` writes it.
"""
