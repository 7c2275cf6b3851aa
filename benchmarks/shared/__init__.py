"""What benchmarks share: measuring a step, records of results, and the published formulation."""
