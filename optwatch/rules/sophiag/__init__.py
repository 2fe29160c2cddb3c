"""SophiaG: momentum over a Hessian's diagonal, clipped element by element."""
