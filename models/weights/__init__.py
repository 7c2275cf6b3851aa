"""Recognise the format of foreign weights, identify their model, load them: formats → identity → loading."""
