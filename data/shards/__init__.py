"""Data sets in tar files: reading, fetching, packing, unpacking and verifying them."""
