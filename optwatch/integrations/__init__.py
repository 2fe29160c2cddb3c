"""Floor 6: glue for what starts and drives training: any command, Hugging Face, Lightning.

Each module imports the framework it is for, so none is imported here.
"""
