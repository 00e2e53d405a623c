"""Suites of attacks and measures: what each network is subjected to, stored as it goes."""
