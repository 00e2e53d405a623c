"""robustkern in other people's training loops; each module needs its framework, and no other."""
