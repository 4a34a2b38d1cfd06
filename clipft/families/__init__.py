"""The model families, a file each.

``family`` says what one is, ``registry`` how it is found, ``losses`` what they train with, ``forward`` what their fused
models have in common.
"""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
