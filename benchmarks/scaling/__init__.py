"""How a run scales: the model of a cluster, plans for it, the overlap of communication, and a check on this machine."""
