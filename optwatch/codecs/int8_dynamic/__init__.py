"""One byte an element with the dynamic map of bitsandbytes and torchao: for their checkpoints."""
