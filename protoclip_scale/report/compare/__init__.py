"""Several runs side by side: what they reached, and what it took."""
