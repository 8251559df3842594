"""`python -m parchgrad`: the command line."""

from parchgrad.cli import main

if __name__ == "__main__":
    main()
