"""The local store: what a run showed, kept in one SQLite file of bounded size.

`LocalStore` writes it in the agent, `RunFile` is the file, `find_run` finds one again for `optwatch report` and
`optwatch export`.
"""

from optwatch.exporters.store.curves import curves
from optwatch.exporters.store.local import LocalStore
from optwatch.exporters.store.runfile import RunFile, StoreError
from optwatch.exporters.store.runs import SUFFIX, find_run, store_directory

__all__ = ["SUFFIX", "LocalStore", "RunFile", "StoreError", "curves", "find_run", "store_directory"]
