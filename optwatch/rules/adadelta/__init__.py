"""Adadelta: steps as large as those before, without a learning rate."""
