"""AdEMAMix: Adam with a second, slow first moment."""
