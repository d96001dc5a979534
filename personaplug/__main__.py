"""`python -m personaplug`."""

from personaplug.cli import main

main()
