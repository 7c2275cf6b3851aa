"""What survives a fault: a run under random faults, the cost of a save, and the scorecard of both."""
