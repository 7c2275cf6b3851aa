"""Weights from elsewhere: recognise their format, identify their model, load them."""
