"""How good a model is: numbers and their intervals, tasks, all scores of one model on one data set."""

from clipft._moved import getattr_of

__getattr__ = getattr_of(__name__)
