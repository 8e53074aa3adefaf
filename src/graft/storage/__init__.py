"""Files that are whole or not there: rows of arrays, atomic writes, locks, digests."""
