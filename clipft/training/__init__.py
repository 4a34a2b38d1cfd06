"""Training: the Trainer, its arguments, and what it is made of."""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
