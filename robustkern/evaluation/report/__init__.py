"""The report of an evaluation: the verdict on each network, and one HTML page for people."""
