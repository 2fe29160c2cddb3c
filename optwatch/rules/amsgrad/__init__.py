"""AMSGrad: Adam and AdamW with a denominator that never shrinks."""
