"""Small leaf modules that every layer may use."""
