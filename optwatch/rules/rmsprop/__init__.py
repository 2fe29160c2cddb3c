"""RMSprop, plain, centered and with momentum."""
