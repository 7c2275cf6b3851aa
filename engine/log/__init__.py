"""What a run writes while it trains: one file for each sink, and `RunLog`, which writes to all of them."""
