"""Arguments that users give as NAME=VALUE."""
import ast


def keywords(arguments) -> dict:
    """['aux_weight=0.25', 'norm=None'] → {'aux_weight': 0.25, 'norm': None}; other than Python literals are strings."""
    values = {}
    for argument in arguments or ():
        name, _, value = argument.partition('=')
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values
