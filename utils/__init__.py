"""How a process starts, talks to others, writes and ends."""
