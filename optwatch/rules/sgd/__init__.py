"""SGD, with and without momentum."""
