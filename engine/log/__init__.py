"""The places that a run is written to: one file for each sink, and `RunLog`, which passes everything on to all of them.

A sink is a subclass of `Sink` (sink.py) in the list SINKS of run_log.py. See there for its methods.
"""
