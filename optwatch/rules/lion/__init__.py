"""Lion: the sign of an interpolated momentum."""
