"""bfloat16: 2 bytes an element, no blocks."""
