"""Small things without a field of their own: options, errors, processes, devices, meters, logs."""
