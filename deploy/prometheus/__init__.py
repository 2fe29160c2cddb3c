"""Recording and alert rules, and an example configuration."""
