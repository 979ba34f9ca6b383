"""A written text shown: explained, animated, watched."""
