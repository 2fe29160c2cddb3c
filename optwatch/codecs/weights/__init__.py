"""Weight formats: how a weight is kept between two steps, in the parameter's own memory and beside it."""
