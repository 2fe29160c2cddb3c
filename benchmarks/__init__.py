"""What optwatch costs, measured against what people use today; results lie in ``results/``."""
