"""A directory for ``PYTHONPATH``, on which ``optwatch run`` puts it: Python then runs its ``sitecustomize`` first."""
