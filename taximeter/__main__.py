"""`python -m taximeter`: the command line."""

from taximeter.cli import main

if __name__ == "__main__":
    main()
