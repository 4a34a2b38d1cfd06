"""The model families: one description of what each is, and how it is found."""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
