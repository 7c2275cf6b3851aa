"""How a process starts, talks to other processes, reads and writes files, and ends.

Nothing here knows a model, a data set or the training loop, so every other folder may import this one.
"""
