"""``python -m clipft.cli``."""

from clipft.cli import main

main()
