"""From what people have to batches: sources and tables of rows, pictures to pixels, the collator, samplers.

A row's way: ``sources`` (with ``tables``, ``shards``, ``columns``) -> ``rows`` -> ``sampling`` -> ``transforms`` ->
``collate``. ``pictures`` opens files without torch; ``drawings`` is the embedded set.
"""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
