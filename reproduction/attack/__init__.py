"""Attacks on the server, its client and the files: bounded in time and in size, over the loopback only."""
