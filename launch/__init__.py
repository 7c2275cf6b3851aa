"""Start processes on one machine or several, watch them, and start them again after a crash."""
