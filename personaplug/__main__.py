"""`python -m personaplug`."""

from personaplug.cli.main import main

main()
