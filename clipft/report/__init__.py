"""What a run leaves for people to read: pages, charts, model cards, contact sheets."""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
