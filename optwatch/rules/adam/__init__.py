"""Adam: moments of a gradient that contains the weight decay."""
