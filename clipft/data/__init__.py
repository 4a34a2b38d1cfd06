"""From what people have to batches: sources and tables of rows, pictures to pixels, the collator, samplers.

A row's way: ``sources`` (with ``folders``, ``table_files``, ``shards``, ``given``) -> ``sampling`` -> ``rows`` ->
``collate``, with ``transforms``. ``pictures`` opens files without torch; ``drawings`` is the embedded set.
"""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
