"""Models: loaded, fused, frozen, with adapters or heads, in int8.

``loading`` is the only module that knows every kind of folder; ``formats`` the names of their files.
"""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
