"""One byte an element in the floating-point format e4m3: for torchao's checkpoints."""
